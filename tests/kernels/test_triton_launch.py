"""A call of the Triton engine up to the launch: Triton binds arguments and compiles for a GPU that is not there."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from vllm_puzzle.kernels.triton.moe import triton_moe
from vllm_puzzle.kernels.triton.target import Target

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = get_current_stream = lambda self, *device: 0

compiled = []
def watch(fn, compile, **rest):
    compiled.append(fn.name)
    json.loads(compile["specialization_data"])

driver.set_active(Driver())
triton.knobs.runtime.jit_post_compile_hook = watch
JITFunction.__getitem__ = lambda self, grid: lambda *args, **kwargs: self.warmup(*args, grid=grid, **kwargs)
target = Target("sm90", "none", num_sms=132, ptx=True)

def call(num_tokens, dtype):
    compiled.clear()
    x = torch.empty(num_tokens, 1024, dtype=dtype)
    w13, w2 = (torch.empty(16, *shape, dtype=torch.int16) for shape in ((512, 1024), (1024, 256)))
    ids, table = torch.zeros(num_tokens, 4, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    triton_moe(x, w13, w2, table, torch.empty(num_tokens, 4), ids, "silu", False, target=target)
    return list(compiled)

print(json.dumps([call(5, torch.bfloat16), call(5, torch.bfloat16), call(6, torch.bfloat16), call(6, torch.float16)]))
"""


@pytest.mark.heavy
def test_what_a_call_compiles() -> None:
    """With a hook that watches compilations, as in vLLM; a number of tokens alone compiles nothing again."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    first, again, another_number, another_dtype = json.loads(run.stdout)
    # So few programs that gate-up's sums are split.
    assert first == ["place_kernel", "gate_up_kernel", "activate_kernel", "down_kernel", "combine_kernel"]
    assert again == another_number == []
    assert {"gate_up_kernel", "down_kernel"} <= set(another_dtype)
