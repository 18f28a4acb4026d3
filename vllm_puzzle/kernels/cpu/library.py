"""The compiled library behind ctypes: finding it, its functions, what this machine lets it use."""

import ctypes
import struct
from enum import IntEnum
from functools import cache
from pathlib import Path

# The OpenMP runtime that the library names is then the one that torch has loaded, and its pool of threads torch's own.
import torch  # noqa: F401

from ..errors import EngineError
from .build import LIBRARY_NAME

LIBRARY_PATH = Path(__file__).parent / LIBRARY_NAME


class Isa(IntEnum):
    """The instruction sets that the engine has kernels for; values as in csrc/abi.h."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AMX_BF16 = 4


# `PuzzleMoeCall` of csrc/abi.h: 8 addresses, 8 sizes, 6 choices. Packed in one go, since a call from Python runs on
# caches that the weights of the last layer have swept, where every line of it costs about a microsecond.
CALL_LAYOUT = struct.Struct("=8Q8q6i")


@cache
def load_library() -> ctypes.CDLL:
    """The library; raises EngineError where it was not built."""
    if not LIBRARY_PATH.exists():
        raise EngineError(
            f"the CPU engine is not compiled: {LIBRARY_PATH} is missing; install vllm-puzzle again on Linux on x86-64, "
            f"where g++ is at hand, or set VLLM_PUZZLE_ENGINE=reference"
        )
    library = ctypes.CDLL(str(LIBRARY_PATH))
    library.puzzlemoe_isa_status.argtypes = [ctypes.c_int32]
    for function in (library.puzzlemoe_workspace_bytes, library.puzzlemoe_packed_moe):
        function.argtypes = [ctypes.c_void_p]
        function.restype = ctypes.c_int64
    library.puzzlemoe_tile_slot.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 4]
    library.puzzlemoe_tile_slot.restype = None
    return library


@cache
def unusable(isa: Isa) -> str | None:
    """Why this machine cannot use an ISA level, None where it can."""
    return {
        0: None,
        1: "this CPU does not have it",
        2: "the kernel does not permit AMX tiles (arch_prctl ARCH_REQ_XCOMP_PERM)",
    }[load_library().puzzlemoe_isa_status(isa)]


def usable_isas() -> list[Isa]:
    """The levels that this machine can use, the most capable last."""
    return [isa for isa in Isa if unusable(isa) is None]
