"""Which engine computes: by device and dtype, or as the environment says."""

import os
from functools import cache

import torch

from .cpu import Isa, unusable, usable_isas
from .errors import EngineError

REFERENCE = "reference"
TRITON = "triton"
_CPU_ENGINES = {f"cpu-{isa.name.lower()}": isa for isa in Isa}
ENGINES = (REFERENCE, TRITON, *_CPU_ENGINES)


@cache
def cpu_isa(engine: str) -> Isa | None:
    """The ISA level of a CPU engine's name, None for the other engines.

    Raises:
        ValueError: a name that is not one of ENGINES.
        EngineError: this machine cannot use the level.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is not one of {list(ENGINES)}")
    isa = _CPU_ENGINES.get(engine)
    if isa is not None and (reason := unusable(isa)):
        raise EngineError(f"the engine {engine} cannot be used: {reason}")
    return isa


def choose_engine(device: torch.device, dtype: torch.dtype) -> str:
    """The engine for activations of `dtype` on `device`.

    $VLLM_PUZZLE_ENGINE is auto (the CPU engine on a CPU, Triton on CUDA and ROCm, the reference engine elsewhere), cpu,
    triton or reference. $VLLM_PUZZLE_CPU_ISA is auto (the most capable level that the CPU and the kernel allow) or a
    level's name; float16 and float32 activations are for the portable level. What cannot be had is refused, never
    replaced.

    Returns:
        One of ENGINES.

    Raises:
        EngineError: an engine or level that does not exist, or cannot be used here or with `dtype`.
    """
    asked = os.environ.get("VLLM_PUZZLE_ENGINE", "auto")
    if asked not in ("auto", "cpu", TRITON, REFERENCE):
        raise EngineError(f"VLLM_PUZZLE_ENGINE={asked} is not an engine; choose auto, cpu, triton or reference")
    if asked == "cpu" and device.type != "cpu":
        raise EngineError(f"VLLM_PUZZLE_ENGINE=cpu cannot compute on {device.type}; choose auto, triton or reference")
    if asked == TRITON or (asked == "auto" and device.type == "cuda"):
        _check_triton(device, dtype)
        return TRITON
    if asked == REFERENCE or device.type != "cpu":
        return REFERENCE
    return f"cpu-{_choose_isa(dtype).name.lower()}"


def _check_triton(device: torch.device, dtype: torch.dtype) -> None:
    try:
        from .triton import DTYPES, current_target
    except ModuleNotFoundError as error:
        raise EngineError(
            f"the triton engine needs {error.name}, which is not installed; install the triton that this torch "
            f"({torch.__version__}) was built for, or choose VLLM_PUZZLE_ENGINE=reference"
        ) from None
    current_target(device)
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise EngineError(
            f"the triton engine computes in bfloat16 and float16 and the model runs in {name}; serve with --dtype "
            f"bfloat16, or choose VLLM_PUZZLE_ENGINE=reference"
        )


def _choose_isa(dtype: torch.dtype) -> Isa:
    asked = os.environ.get("VLLM_PUZZLE_CPU_ISA", "auto")
    levels = ", ".join(isa.name.lower() for isa in Isa)
    if asked == "auto":
        return usable_isas()[-1] if dtype == torch.bfloat16 else Isa.PORTABLE
    isa = _CPU_ENGINES.get(f"cpu-{asked}")
    if isa is None:
        raise EngineError(f"VLLM_PUZZLE_CPU_ISA={asked} is not a level; choose auto, {levels}")
    if reason := unusable(isa):
        usable = ", ".join(level.name.lower() for level in usable_isas())
        raise EngineError(f"VLLM_PUZZLE_CPU_ISA={asked} cannot be used: {reason}; this machine can use {usable}")
    if dtype != torch.bfloat16 and isa is not Isa.PORTABLE:
        name = str(dtype).removeprefix("torch.")
        raise EngineError(
            f"VLLM_PUZZLE_CPU_ISA={asked} computes in bfloat16 and the model runs in {name}; choose auto or portable, "
            f"or serve with --dtype bfloat16"
        )
    return isa
