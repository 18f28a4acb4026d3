"""Which engine computes: by device and dtype, or as the environment says."""

import os

import torch

from vllm_puzzle.format import WORD16, WordLayout

from .engine import Engine, reads_no_codes
from .errors import EngineError
from .registry import ENGINES


def choose_engine(device: torch.device, dtype: torch.dtype, layout: WordLayout = WORD16, codes: bool = False) -> Engine:
    """The engine for activations of `dtype` on `device` and words of `layout`, or with `codes` for coded experts.

    $VLLM_PUZZLE_ENGINE is auto (the CPU engine on a CPU, Triton on CUDA and ROCm, the reference engine elsewhere), cpu,
    triton or reference. $VLLM_PUZZLE_CPU_ISA is auto (the most capable level that the CPU and the kernel allow) or a
    level's name; float16 and float32 activations are for the portable level. What cannot be had is refused, never
    replaced.

    Raises:
        EngineError: an engine or level that does not exist, or cannot be used here, with `dtype`, with `layout` or with
            codes.
    """
    asked = os.environ.get("VLLM_PUZZLE_ENGINE", "auto")
    families = list(dict.fromkeys(engine.family for engine in ENGINES.values()))
    if asked != "auto" and asked not in families:
        choices = f"{', '.join(('auto', *families[:-1]))} or {families[-1]}"
        raise EngineError(f"VLLM_PUZZLE_ENGINE={asked} is not an engine; choose {choices}")
    first = next(
        engine for engine in ENGINES.values() if (engine.suits(device) if asked == "auto" else engine.family == asked)
    )
    engine = first.choose(device, dtype)
    if codes and not engine.reads_codes:
        raise EngineError(reads_no_codes(engine))
    if layout not in engine.layouts:
        raise EngineError(
            f"the engine {engine.name} does not read words of {layout.bits} bits; choose another VLLM_PUZZLE_ENGINE"
        )
    return engine
