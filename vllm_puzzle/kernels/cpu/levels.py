"""Which instruction sets this machine can use, and which of them computes."""

from collections.abc import Callable
from functools import cache

import torch

from ..errors import EngineError
from .library import Isa, IsaStatus, load_library


@cache
def unusable(isa: Isa) -> str | None:
    """Why this machine cannot use an ISA level, None where it can."""
    return {
        IsaStatus.USABLE: None,
        IsaStatus.CPU_LACKS_IT: "this CPU does not have it",
        IsaStatus.KERNEL_REFUSES_IT: "the kernel does not permit AMX tiles (arch_prctl ARCH_REQ_XCOMP_PERM)",
    }[load_library().puzzlemoe_isa_status(isa)]


def usable_isas(unusable: Callable[[Isa], str | None] = unusable) -> list[Isa]:
    """The levels that this machine can use, the most capable last."""
    return [isa for isa in Isa if unusable(isa) is None]


def choose_isa(asked: str, dtype: torch.dtype, unusable: Callable[[Isa], str | None] = unusable) -> Isa:
    """The level for activations of `dtype`.

    Args:
        asked: a level's name in small letters, or auto: the most capable one, and the portable one where `dtype` is not
            bfloat16.
        unusable: says of a level why the machine cannot use it; by default, of this machine.

    Raises:
        EngineError: there is no such level, or it cannot be used here or with `dtype`.
    """
    if asked == "auto":
        return usable_isas(unusable)[-1] if dtype == torch.bfloat16 else Isa.PORTABLE
    levels = {isa.name.lower(): isa for isa in Isa}
    isa = levels.get(asked)
    if isa is None:
        raise EngineError(f"VLLM_PUZZLE_CPU_ISA={asked} is not a level; choose auto, {', '.join(levels)}")
    if reason := unusable(isa):
        usable = ", ".join(level.name.lower() for level in usable_isas(unusable))
        raise EngineError(f"VLLM_PUZZLE_CPU_ISA={asked} cannot be used: {reason}; this machine can use {usable}")
    if dtype != torch.bfloat16 and isa is not Isa.PORTABLE:
        name = str(dtype).removeprefix("torch.")
        raise EngineError(
            f"VLLM_PUZZLE_CPU_ISA={asked} computes in bfloat16 and the model runs in {name}; choose auto or portable, "
            f"or serve with --dtype bfloat16"
        )
    return isa
