"""The compiled loop over the rows of two matrices: merged and packed in one pass, bit for bit as torch does it.

torch makes some eighty passes over a block of rows, so that this is six times as fast. The decisions are those of
`elements`, the words those of `vllm_puzzle.format`; packing.cpp repeats both for CPUs.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch

LIBRARY_PATH = Path(__file__).parent / "libpuzzlemoe_packing.so"


class Sums(ctypes.Structure):
    """`Sums` of packing.cpp: what no word can hold, and the fields of `MergeStatistics`."""

    _fields_ = (
        ("refused", ctypes.c_int64),
        ("shared", ctypes.c_int64),
        ("kept", ctypes.c_int64),
        ("squared_error", ctypes.c_double),
        ("squared_weight", ctypes.c_double),
    )
    refused: int
    shared: int
    kept: int
    squared_error: float
    squared_weight: float


def is_compiled() -> bool:
    """Whether the library was built: at install, on Linux on x86-64."""
    return LIBRARY_PATH.exists()


def pack_rows(
    weights: torch.Tensor,
    by_row: torch.Tensor | None,
    by_column: torch.Tensor,
    tau: float | None,
    words: torch.Tensor,
) -> Sums:
    """Merges two matrices element by element and packs them. All tensors are on the CPU.

    Args:
        weights: float32 (2, num_rows, num_columns).
        by_row, by_column: their product is the second argument of the rule, float32 (2, num_rows, 1), None for ones,
            and (2, 1, num_columns).
        tau: of `paper_rule`; None decides by `cheapest`.
        words: int16 (num_rows, num_columns), contiguous, to be written.

    Returns:
        Sums over the elements. Where `refused` is not 0 some words mean nothing.
    """
    weights, by_column = weights.contiguous(), by_column.contiguous()
    by_row = None if by_row is None else by_row.contiguous()
    assert weights.dtype == by_column.dtype == torch.float32
    assert words.is_contiguous()
    _, num_rows, num_columns = weights.shape
    sums = Sums()
    arguments = (
        weights.data_ptr(),
        None if by_row is None else by_row.data_ptr(),
        by_column.data_ptr(),
        num_rows,
        num_columns,
        words.data_ptr(),
        ctypes.byref(sums),
    )
    if tau is None:
        _load().puzzlemoe_pack_by_cost(*arguments)
    else:
        _load().puzzlemoe_pack_by_paper(tau, *arguments)
    return sums


@cache
def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY_PATH))
    address, size = ctypes.c_void_p, ctypes.c_int64
    library.puzzlemoe_pack_by_cost.argtypes = [address, address, address, size, size, address, address]
    library.puzzlemoe_pack_by_paper.argtypes = [ctypes.c_float, *library.puzzlemoe_pack_by_cost.argtypes]
    for function in (library.puzzlemoe_pack_by_cost, library.puzzlemoe_pack_by_paper):
        function.restype = None
    return library
