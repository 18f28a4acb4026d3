"""The compiled library behind ctypes: finding it, its functions, the numbers that its calls are made of."""

import ctypes
import struct
from enum import IntEnum
from functools import cache
from pathlib import Path

# The OpenMP runtime that the library names is then the one that torch has loaded, and its pool of threads torch's own.
import torch

from ..errors import EngineError
from .build import LIBRARY_NAME

LIBRARY_PATH = Path(__file__).parent / LIBRARY_NAME


class Isa(IntEnum):
    """The instruction sets that there are kernels for: `PuzzleMoeIsa` of csrc/abi.h."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AVX512_VBMI = 4
    AMX_BF16 = 5


class IsaStatus(IntEnum):
    """What `puzzlemoe_isa_status` returns: `PuzzleMoeIsaStatus` of csrc/abi.h."""

    USABLE = 0
    CPU_LACKS_IT = 1
    KERNEL_REFUSES_IT = 2


class Dtype(IntEnum):
    """The dtypes of activations: `PuzzleMoeDtype` of csrc/abi.h."""

    BFLOAT16 = 0
    FLOAT16 = 1
    FLOAT32 = 2


class IdType(IntEnum):
    """The types of expert ids: `PuzzleMoeIdType` of csrc/abi.h."""

    INT32 = 0
    INT64 = 1


class Activation(IntEnum):
    """The activations that are compiled: `PuzzleMoeActivation` of csrc/abi.h."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2


class Refusal(IntEnum):
    """Why a call was not computed: `PuzzleMoeRefusal` of csrc/abi.h."""

    UNKNOWN_EXPERT = -1
    UNKNOWN_SLOT = -2
    MISSING_ADDRESS = -3
    TOO_MANY_ROWS = -4
    UNKNOWN_CODES = -5


DTYPES = {torch.bfloat16: Dtype.BFLOAT16, torch.float16: Dtype.FLOAT16, torch.float32: Dtype.FLOAT32}
ID_TYPES = {torch.int32: IdType.INT32, torch.int64: IdType.INT64}
ACTIVATIONS = {"silu": Activation.SILU, "gelu": Activation.GELU, "gelu_tanh": Activation.GELU_TANH}

# `PuzzleMoeCall` of csrc/abi.h: 8 addresses, 8 sizes, 6 choices. Packed in one go, since a call from Python runs on
# caches that the weights of the last layer have swept, where every line of it costs about a microsecond.
CALL_LAYOUT = struct.Struct("=8Q8q6i")
# What `PuzzleMoeCodedCall` has behind it: 3 addresses and a size for each matrix.
CODES_LAYOUT = struct.Struct("=3Qq3Qq")


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
    for function in (library.puzzlemoe_workspace_bytes, library.puzzlemoe_packed_moe, library.puzzlemoe_coded_moe):
        function.argtypes = [ctypes.c_void_p]
        function.restype = ctypes.c_int64
    library.puzzlemoe_tile_slot.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 4]
    library.puzzlemoe_tile_slot.restype = None
    pointers, sizes, choices = [ctypes.c_void_p] * 2, [ctypes.c_int64] * 2, [ctypes.c_int32] * 2
    library.puzzlemoe_order_codes.argtypes = [*pointers, *sizes, *choices]
    library.puzzlemoe_order_codes.restype = None
    library.puzzlemoe_order_codebook.argtypes = [ctypes.c_void_p, *choices]
    library.puzzlemoe_order_codebook.restype = None
    return library
