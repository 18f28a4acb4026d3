"""Slots and codes as the CPU kernels read them: on huge pages, in tile order or code order."""

import mmap
import warnings

import torch

from vllm_puzzle.format import CODE_BITS, num_words

from ..checks import has_memory
from ..coded import LARGEST_CODEBOOK, CodedMatrices
from .library import Isa, load_library

# Rows and columns come in blocks of 32 (csrc/tiles.h).
BLOCK = 32


def empty_slots(num_slots: int, rows: int, columns: int) -> torch.Tensor:
    """Zero words for slots that are still to be loaded, on huge pages: decoding is one stream through memory.

    Returns:
        (num_slots, rows, columns), int16.
    """
    return empty_bytes(2 * num_slots * rows * columns).view(torch.int16).view(num_slots, rows, columns)


def empty_bytes(num_bytes: int) -> torch.Tensor:
    """uint8 (num_bytes,), zeros, on huge pages."""
    if not num_bytes:
        return torch.zeros(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        warnings.warn(f"experts lie on small pages, which slows them down: {error}", stacklevel=2)
    return torch.frombuffer(memory, dtype=torch.uint8)


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


def order_codes_(w13: CodedMatrices, w2: CodedMatrices, isa: Isa) -> None:
    """Puts codes and codebooks into the order in which a level reads them, in place, with a copy of one expert.

    Args:
        w13: with rows and columns that are padded to multiples of 32; `w2` with half as many rows as w13 has columns.

    Raises:
        ValueError: tensors that do not fit each other, or are not contiguous on the CPU with memory of their own.
    """
    columns = {"w13": 2 * w2.scale.shape[-1], "w2": w13.scale.shape[-1]}
    for name, matrices in (("w13", w13), ("w2", w2)):
        _check_codes(name, matrices, columns[name])
    library = load_library()
    scratch = torch.empty(
        max(_largest_bytes(w13, columns["w13"]), _largest_bytes(w2, columns["w2"])), dtype=torch.uint8
    )
    for name, matrices in (("w13", w13), ("w2", w2)):
        for codebook, (begin, bits) in zip(matrices.codebook, matrices.index.tolist(), strict=True):
            address = matrices.codes.data_ptr() + begin
            rows = matrices.scale.shape[2]
            library.puzzlemoe_order_codes(address, scratch.data_ptr(), rows, columns[name], bits, isa)
            library.puzzlemoe_order_codebook(codebook.data_ptr(), bits, isa)


def _largest_bytes(matrices: CodedMatrices, columns: int) -> int:
    """The bytes of the widest expert's codes."""
    widths: list[int] = matrices.index[:, 1].tolist()
    return 4 * matrices.scale.shape[2] * num_words(columns, max(widths, default=0))


def _check_codes(name: str, matrices: CodedMatrices, columns: int) -> None:
    experts, rows = matrices.scale.shape[0], matrices.scale.shape[-1]
    dtypes = (torch.uint8, torch.int64, torch.bfloat16, torch.bfloat16)
    shapes = (matrices.codes.shape[:1], (experts, 2), (experts, LARGEST_CODEBOOK, 2), (experts, 2, rows))
    fits = rows % (BLOCK // 2) == 0 and columns % BLOCK == 0
    for tensor, dtype, shape in zip(matrices.tensors(), dtypes, shapes, strict=True):
        sound = tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous() and has_memory(tensor)
        fits = fits and sound and tensor.shape == shape
    ends = 0
    for begin, bits in matrices.index.tolist() if fits else ():
        fits = fits and bits in CODE_BITS and begin == ends
        ends += 4 * rows * num_words(columns, bits) if fits else 0
    if not fits or ends != len(matrices.codes):
        kinds = ", ".join(f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}" for tensor in matrices.tensors())
        raise ValueError(
            f"{name} must be codes as the CPU engine allocates them, in sizes that are multiples of {BLOCK}, with all "
            f"their memory; it is {kinds}"
        )
