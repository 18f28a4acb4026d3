"""Settings for every test: no network, and vLLM engines inside the test process on a small KV cache.

Without a GPU, Triton's kernels run in its interpreter; with one, they are compiled, for the tests marked `gpu`.
"""

import os

import torch

try:
    from hypothesis import settings
except ModuleNotFoundError:
    # A card may be lent with little more than torch and Triton, which is all that most tests of the kernels need.
    collect_ignore_glob = ["kernels/test_random_*.py"]
else:
    # How long an example takes is no property of the code on a machine that does other things too.
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")

if not torch.cuda.is_available():
    # Read when triton is first imported.
    os.environ["TRITON_INTERPRET"] = "1"

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_CI_ENV="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    # Threads that spin at barriers starve each other where other processes share the cores.
    OMP_WAIT_POLICY="PASSIVE",
)
