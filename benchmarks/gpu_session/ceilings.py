"""What the card is, and what it does at most."""

import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
import triton

from vllm_puzzle.tuning.card import Card
from vllm_puzzle.tuning.gpu import gpu_of

Say = Callable[..., None]
Microseconds = Callable[[Callable[[], object]], float]

QUERY = (
    *("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    *("power.draw", "power.limit", "temperature.gpu", "memory.used", "memory.total"),
)
ROUNDS = 10
READ_BYTES = 1 << 31
PRODUCT_SIZE = 8192
LAUNCHES = 101


def describe(card: Card, say: Say) -> None:
    """Versions, and the GPU as everything is compiled for it."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    say(what="versions", **versions, triton=triton.__version__, python=sys.version.split()[0])
    gpu = gpu_of(card.device)
    if card.device.type == "cpu":
        say(what="gpu", gpu=asdict(gpu))
        return
    properties = torch.cuda.get_device_properties(card.device)
    say(what="gpu", gpu=asdict(gpu), memory=properties.total_memory, l2=properties.L2_cache_size)
    say(what="nvidia-smi", **_smi())


def _smi() -> dict[str, str]:
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"missing": str(error)}
    values = run.stdout.strip().split("\n")[0].split(", ")
    return dict(zip(QUERY, values, strict=False)) if run.returncode == 0 else {"missing": run.stderr.strip()[:300]}


def measure(card: Card, say: Say) -> None:
    """Reading, copying, products in BF16 and in FP8, and launches in a graph; clocks afterwards."""
    shrink = 1 if card.device.type == "cuda" else 1 << 7

    def us(work: Callable[[], object]) -> float:
        return statistics.median(card.times([work] * ROUNDS)[2:])

    _measure_memory(torch.ones(READ_BYTES // 4 // shrink, device=card.device), us, say)
    size = PRODUCT_SIZE // shrink
    a, b = (torch.randn(size, size, device=card.device, dtype=torch.bfloat16) for _ in range(2))
    say(what="ceilings", bf16_tflops=round(2 * size**3 / us(partial(torch.matmul, a, b)) / 1e6, 1))
    if card.device.type == "cuda":
        _measure_fp8(a, b, us, say)
    one = torch.zeros(1, device=card.device)
    for count in (1, LAUNCHES):
        replay, _ = card.capture([partial(one.add_, 1)] * count)
        say(what="launches", kernels=count, us=round(us(replay), 2))
    if card.device.type == "cuda":
        say(what="nvidia-smi", **_smi())


def _measure_memory(source: torch.Tensor, us: Microseconds, say: Say) -> None:
    read = us(source.sum)
    copied = us(partial(torch.empty_like(source).copy_, source))
    say(
        what="ceilings",
        read_gb_per_s=round(source.nbytes / read / 1e3, 1),
        copy_gb_per_s=round(2 * source.nbytes / copied / 1e3, 1),
    )


def _measure_fp8(a: torch.Tensor, b: torch.Tensor, us: Microseconds, say: Say) -> None:
    scale = torch.ones((), device=a.device)
    try:
        q, r = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T
        product = partial(torch._scaled_mm, q, r, scale, scale, out_dtype=torch.bfloat16)
        say(what="ceilings", fp8_tflops=round(2 * len(a) ** 3 / us(product) / 1e6, 1))
    except (RuntimeError, TypeError) as error:
        say(what="ceilings", missing=f"fp8: {error}"[:300])
