"""Packing magnitudes, masks and signs into words, and reading one member's BF16 weights back."""

from collections.abc import Sequence

import torch

from .layout import WORD16, FormatError, WordLayout


def nearest_magnitude(magnitude: torch.Tensor, layout: WordLayout = WORD16, name: str = "tensor") -> torch.Tensor:
    """The storable magnitude nearest to each of `magnitude`.

    Args:
        magnitude: any shape, floating; its sign is ignored.
        name: what the error message calls the tensor.

    Returns:
        bfloat16, the same shape, each element 0 or in [layout.smallest, layout.largest]. What lies between 0 and
        `layout.smallest` goes to the nearer of the two, the middle upwards.

    Raises:
        FormatError: an element is NaN, infinite or larger than `layout.largest`; names tensor and index.
    """
    rounded = magnitude.to(torch.bfloat16).abs()
    # Written so that NaN, which compares false with everything, is refused as well.
    if rounded.numel() and not rounded.max() <= layout.largest:
        refused = ~(rounded <= layout.largest)
        index = tuple(refused.nonzero()[0].tolist())
        raise FormatError(
            f"{name}{list(index)} is {magnitude[index].item()}: a packed word holds finite magnitudes up to "
            f"{layout.largest:g} only ({int(refused.sum())} of {refused.numel()} elements are beyond it); "
            f"repair the tensor or leave this checkpoint unpacked"
        )
    bits = rounded.view(torch.int16)
    # As bits, `rebias` is half the smallest magnitude, so this is -1 for what goes to zero, and 0 for all else.
    dropped = (bits - layout.rebias) >> 15
    return (bits.clamp(min=layout.rebias + (1 << layout.mantissa_bits)) & ~dropped).view(torch.bfloat16)


def check_storable(matrices: Sequence[torch.Tensor], names: Sequence[str]) -> None:
    """Raises FormatError for the first element that no packed word can hold; names its tensor and index.

    Left to packing, such an element could hide behind its mate's, or be reported at a place in the merged matrix.

    Args:
        matrices: of one expert; `names` are theirs.
    """
    for matrix, name in zip(matrices, names, strict=True):
        low, high = torch.aminmax(matrix)
        if not max(-low.item(), high.item()) <= WORD16.largest:
            nearest_magnitude(matrix, name=name)


def pack(
    magnitude: torch.Tensor,
    masks: Sequence[torch.Tensor],
    signs: Sequence[torch.Tensor],
    layout: WordLayout = WORD16,
    name: str = "tensor",
) -> torch.Tensor:
    """Packs one shared magnitude with the masks and signs of one or two members.

    Args:
        magnitude: any shape, floating, not negative; rounded to the nearest storable magnitude.
        masks: one or two bool tensors of that shape: whether the member has this weight at all.
        signs: as many bool tensors of that shape: whether the member's weight is negative.
        name: what the error message calls the tensor.

    Returns:
        `layout.dtype`, the shape of `magnitude`. Where no member has the weight, or the magnitude is zero, the word
        is zero; a sign is stored only where its mask is, so that no decoder has to clear it.

    Raises:
        FormatError: a magnitude that cannot be stored.
    """
    bits = nearest_magnitude(magnitude, layout, name).view(torch.int16) - layout.rebias
    # By bits alone: on a CPU `torch.where` takes a branch for every element. Only a zero is below `rebias`.
    nonzero = ~(bits >> 15)
    held = torch.zeros_like(bits)
    for member, (mask, sign) in enumerate(zip(masks, signs, strict=True)):
        has, negative = mask.to(torch.int16), (mask & sign).to(torch.int16)
        bits |= has << layout.mask_bits[member]
        bits |= negative << layout.sign_bits[member]
        held |= has
    return (bits & nonzero & -held).to(layout.dtype)


def pack_single(weight: torch.Tensor, layout: WordLayout = WORD16, name: str = "tensor") -> torch.Tensor:
    """Packs the weights of a slot that holds one expert, as its member 0; see `pack`."""
    return pack(weight, [torch.ones_like(weight, dtype=torch.bool)], [torch.signbit(weight)], layout, name)


def unpack(words: torch.Tensor, member: int, layout: WordLayout = WORD16) -> torch.Tensor:
    """The weights of one member.

    Args:
        words: any shape, `layout.dtype`.
        member: 0 or 1.

    Returns:
        bfloat16, the same shape: `M ? (S << 15 | (w & magnitude_mask) + rebias) : 0` read as BF16 bits.
    """
    top = layout.bits - 1
    sign = (words << (top - layout.sign_bits[member])) & -(1 << top)
    # The arithmetic shift spreads the mask bit over the whole word.
    keep = (words << (top - layout.mask_bits[member])) >> top
    return ((sign | ((words & layout.magnitude_mask) + layout.rebias)) & keep).view(torch.bfloat16)


def find_invalid_word(words: torch.Tensor, layout: WordLayout = WORD16) -> tuple[int, ...] | None:
    """The index of the first word that `pack` never writes, or None.

    Such a word has exponent field 0 without being zero, a sign without its mask, or a magnitude without a member.
    """
    wide = words.to(torch.int32)
    held = torch.zeros_like(wide, dtype=torch.bool)
    invalid = torch.zeros_like(held)
    for sign_bit, mask_bit in zip(layout.sign_bits, layout.mask_bits, strict=True):
        mask = (wide >> mask_bit) & 1
        held |= mask.bool()
        invalid |= (((wide >> sign_bit) & 1) > mask).bool()
    exponent = (wide & layout.magnitude_mask) >> layout.mantissa_bits
    invalid |= (wide != 0) & (~held | (exponent == 0))
    if not invalid.any():
        return None
    return tuple(invalid.nonzero()[0].tolist())
