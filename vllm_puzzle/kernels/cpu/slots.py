"""Slots as the CPU kernels read them: on huge pages, in tile order."""

import math
import mmap
import warnings

import torch

from ..checks import has_memory
from .library import load_library

# Rows and columns come in blocks of 32 (csrc/tiles.h).
BLOCK = 32


def empty_slots(num_slots: int, rows: int, columns: int) -> torch.Tensor:
    """Zero words for slots that are still to be loaded, on huge pages: decoding is one stream through memory.

    Returns:
        (num_slots, rows, columns), int16.
    """
    shape = (num_slots, rows, columns)
    if not math.prod(shape):
        return torch.zeros(shape, dtype=torch.int16)
    memory = mmap.mmap(-1, 2 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        warnings.warn(f"packed experts lie on small pages, which slows them down: {error}", stacklevel=2)
    return torch.frombuffer(memory, dtype=torch.int16).view(shape)


def tile_slots_(w13: torch.Tensor, w2: torch.Tensor) -> None:
    """Puts words into the order in which the kernels read them, in place, with a copy of one slot at a time.

    Args:
        w13: (num_slots, 2 * padded intermediate_size, padded hidden_size), int16, gate rows above up rows.
        w2: (num_slots, padded hidden_size, padded intermediate_size), int16.

    Raises:
        ValueError: sizes that are not multiples of 32, or tensors that are not contiguous int16 on the CPU, with memory
            of their own for every word.
    """
    half = w13.shape[1] // 2
    for name, words, block in (("w13", w13, 2 * BLOCK), ("w2", w2, BLOCK)):
        if (
            words.shape[1] % block
            or words.shape[2] % BLOCK
            or not words.is_contiguous()
            or words.dtype != torch.int16
            or not words.is_cpu
            or not has_memory(words)
        ):
            raise ValueError(
                f"{name} must be contiguous int16 words on the CPU in sizes that are multiples of {BLOCK}; it is "
                f"{words.dtype} {list(words.shape)} on {words.device}, with {words.untyped_storage().nbytes()} bytes "
                f"of memory"
            )
    library = load_library()
    scratch = torch.empty(max(w13.shape[1] * w13.shape[2], w2.shape[1] * w2.shape[2]), dtype=torch.int16)
    for words, first_step, second_begin in ((w13, BLOCK // 2, half), (w2, BLOCK, BLOCK // 2)):
        for slot in words:
            library.puzzlemoe_tile_slot(
                slot.data_ptr(), scratch.data_ptr(), words.shape[1], words.shape[2], first_step, second_begin
            )
