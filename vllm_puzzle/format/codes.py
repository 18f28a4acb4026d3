"""Codes: one small number for two weights of an expert, which a codebook of points and two scales turn into them.

A code of gate and up is for the weights `gate[n, k]` and `up[n, k]` of neuron n; a code of down is for `down[2 r, k]`
and `down[2 r + 1, k]`. A weight is a coordinate of the code's point times the scale of its row.
"""

from collections.abc import Sequence

import torch

from .layout import FormatError

CODE_BITS = (4, 5, 6, 8)
"""The widths that a code can have, for 2, 2.5, 3 and 4 bits a weight."""

CODES_PER_GROUP = 32
"""This many codes of b bits fill b words of 32 bits; the columns of a matrix are padded to a multiple."""

_WORD_BITS = 32


def num_words(columns: int, bits: int) -> int:
    """The int32 words that hold `columns` codes of `bits` bits."""
    return -(-columns // CODES_PER_GROUP) * bits


def pack_codes(codes: torch.Tensor, bits: int, zero: int) -> torch.Tensor:
    """Packs codes into a little-endian bit stream along each row.

    Code j of a row is in the bits `j * bits` to `j * bits + bits - 1` of its stream, bit 0 being the least significant
    of word 0.

    Args:
        codes: uint8 (rows, columns), each below `2 ** bits`.
        bits: one of CODE_BITS.
        zero: the code of (0, 0), which fills the last group.

    Returns:
        int32 (rows, num_words(columns, bits)).

    Raises:
        FormatError: a code that needs more bits, or a width that there is none of.
    """
    _check_bits(bits)
    if codes.numel() and int(codes.max()) >> bits:
        raise FormatError(f"code {int(codes.max())} does not fit {bits} bits")
    rows, columns = codes.shape
    num_groups = -(-columns // CODES_PER_GROUP)
    padded = torch.nn.functional.pad(codes, (0, num_groups * CODES_PER_GROUP - columns), value=zero)
    groups = padded.view(rows, num_groups, CODES_PER_GROUP).to(torch.int64)
    words = torch.zeros(rows, num_groups, bits, dtype=torch.int64, device=codes.device)
    for j in range(CODES_PER_GROUP):
        word, shift = divmod(j * bits, _WORD_BITS)
        shifted = groups[:, :, j] << shift
        words[:, :, word] |= shifted & 0xFFFFFFFF
        if shift + bits > _WORD_BITS:
            words[:, :, word + 1] |= shifted >> _WORD_BITS
    # The upper half of 32 bits is negative as int32.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).view(rows, num_groups * bits)


def unpack_codes(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The codes that `pack_codes` was given.

    Args:
        words: int32 (rows, num_words(columns, bits)).
        bits: one of CODE_BITS.

    Returns:
        uint8 (rows, columns).

    Raises:
        FormatError: another number of words than the columns take.
    """
    _check_bits(bits)
    rows = words.shape[0]
    if words.shape[1] != num_words(columns, bits):
        raise FormatError(
            f"{columns} codes of {bits} bits take {num_words(columns, bits)} words a row, found {words.shape[1]}"
        )
    num_groups = words.shape[1] // bits
    stream = words.reshape(rows, num_groups, bits).to(torch.int64) & 0xFFFFFFFF
    codes = torch.empty(rows, num_groups, CODES_PER_GROUP, dtype=torch.uint8, device=words.device)
    for j in range(CODES_PER_GROUP):
        word, shift = divmod(j * bits, _WORD_BITS)
        value = stream[:, :, word] >> shift
        if shift + bits > _WORD_BITS:
            value = value | stream[:, :, word + 1] << (_WORD_BITS - shift)
        codes[:, :, j] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return codes.view(rows, num_groups * CODES_PER_GROUP)[:, :columns]


def zero_code(codebook: torch.Tensor, name: str = "codebook") -> int:
    """The first code of (0, 0), which stands for padding and for weights that are zero.

    Args:
        codebook: bfloat16 (2 ** bits, 2); `name` is what an error calls it.

    Raises:
        FormatError: the codebook has none.
    """
    zeros = (codebook == 0).all(dim=1).nonzero()
    if not len(zeros):
        raise FormatError(f"{name} has no point (0, 0), which every codebook needs")
    return int(zeros[0])


def check_codebook(codebook: torch.Tensor, scales: torch.Tensor, name: str = "codebook") -> None:
    """Raises FormatError for a codebook or scales that no converter writes: without (0, 0), or not finite."""
    zero_code(codebook, name)
    for what, values in (("points", codebook), ("scales", scales)):
        if not torch.isfinite(values).all():
            raise FormatError(f"{name}: its {what} hold numbers that are not finite")


def check_codable(matrices: Sequence[torch.Tensor], names: Sequence[str]) -> None:
    """Raises FormatError for the first element that no code can stand for; names its tensor and index.

    Args:
        matrices: of one expert; `names` are theirs.
    """
    for matrix, name in zip(matrices, names, strict=True):
        finite = matrix.isfinite()
        if not finite.all():
            index = (~finite).nonzero()[0].tolist()
            raise FormatError(
                f"{name}{index} is {matrix[tuple(index)].item()}: codes stand for finite numbers; repair the tensor"
            )


def decode(codes: torch.Tensor, codebook: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The two weights of every code: a point's coordinates times the scales of their rows.

    Args:
        codes: uint8 (rows, columns).
        codebook: bfloat16 (2 ** bits, 2).
        scales: bfloat16 (2, rows).

    Returns:
        float32 (2, rows, columns), exact: the product of two bfloat16 numbers fits.
    """
    points = codebook.float()[codes.int()].permute(2, 0, 1)
    return points * scales.float()[:, :, None]


def split_rows(down: torch.Tensor) -> torch.Tensor:
    """Even and odd rows of a down projection, (hidden_size, columns), as (2, (hidden_size + 1) // 2, columns).

    An odd number of rows is followed by one of zeros.
    """
    padded = torch.nn.functional.pad(down, (0, 0, 0, down.shape[0] % 2))
    return padded.view(-1, 2, down.shape[1]).transpose(0, 1)


def join_rows(halves: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The inverse of `split_rows`: (2, rows, columns) to (num_rows, columns)."""
    return halves.transpose(0, 1).reshape(-1, halves.shape[2])[:num_rows]


def _check_bits(bits: int) -> None:
    if bits not in CODE_BITS:
        raise FormatError(f"codes of {bits} bits are not known; they have {', '.join(map(str, CODE_BITS))}")
