"""The loops over columns, compiled from coding.cpp: for CPUs, with the results of `loops` bit for bit."""

import ctypes
from functools import cache
from pathlib import Path

import torch

from .table import Table

LIBRARY_PATH = Path(__file__).parent / "libpuzzlemoe_coding.so"


class _Block(ctypes.Structure):
    """`Block` of coding.cpp."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("corner", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("errors", ctypes.c_void_p),
        ("corner_stride", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("points", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    )


def is_compiled() -> bool:
    """Whether the library was built: at install, on Linux on x86-64."""
    return LIBRARY_PATH.exists()


def choose_nearest(weights: torch.Tensor, table: Table, codes: torch.Tensor) -> None:
    """See `loops.choose_nearest`."""
    _load().puzzlemoe_nearest(_block(weights, table, codes))


def compensate_block(weights: torch.Tensor, table: Table, corner: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """See `loops.compensate_block`."""
    errors = torch.empty(weights.shape)
    _load().puzzlemoe_compensate(_block(weights, table, codes, corner, errors))
    return errors


def descend_block(pull: torch.Tensor, table: Table, corner: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """See `loops.descend_block`."""
    moved = torch.empty(pull.shape)
    _load().puzzlemoe_descend(_block(pull, table, codes, corner, moved))
    return moved


def _block(
    weights: torch.Tensor,
    table: Table,
    codes: torch.Tensor,
    corner: torch.Tensor | None = None,
    errors: torch.Tensor | None = None,
) -> _Block:
    _, rows, columns = weights.shape
    stride = weights.stride(1)
    assert weights.dtype == torch.float32
    assert codes.dtype == torch.uint8
    assert weights.stride() == (rows * stride, stride, 1)
    assert codes.stride() == (stride, 1)
    assert all(each.is_contiguous() for each in (table.values, table.slopes, table.offsets))
    assert corner is None or corner.stride(1) == 1
    return _Block(
        table.values.data_ptr(),
        table.slopes.data_ptr(),
        table.offsets.data_ptr(),
        None if corner is None else corner.data_ptr(),
        weights.data_ptr(),
        codes.data_ptr(),
        None if errors is None else errors.data_ptr(),
        0 if corner is None else corner.stride(0),
        stride,
        rows,
        columns,
        table.offsets.shape[1],
        torch.get_num_threads(),
    )


@cache
def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY_PATH))
    for function in (library.puzzlemoe_nearest, library.puzzlemoe_compensate, library.puzzlemoe_descend):
        function.argtypes = [ctypes.POINTER(_Block)]
        function.restype = None
    return library
