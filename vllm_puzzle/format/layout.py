"""The bit layout of a packed word: the one place that knows which bit means what.

The build of the CPU engine loads this file by path, where there is no torch yet.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BF16_MANTISSA_BITS = 7
BF16_EXPONENT_BIAS = 127


class FormatError(ValueError):
    """Something that the packed format cannot hold or that breaks its rules."""


@dataclass(frozen=True)
class WordLayout:
    """Where a word keeps the signs, masks, exponent and mantissa of its two members.

    Bit numbers count from the least significant bit. An exponent field E of 1 and more stands for the
    BF16 exponent field `E + exponent_offset`; E = 0 belongs to the all-zero word alone.
    """

    bits: int
    sign_bits: tuple[int, int]
    mask_bits: tuple[int, int]
    exponent_bits: int
    mantissa_bits: int
    exponent_offset: int

    @property
    def dtype(self) -> "torch.dtype":
        """The integer that holds a word."""
        import torch

        return {16: torch.int16}[self.bits]

    @property
    def safetensors_dtype(self) -> str:
        """The same in safetensors' spelling."""
        return {16: "I16"}[self.bits]

    @property
    def magnitude_mask(self) -> int:
        """The bits of exponent and mantissa."""
        return (1 << (self.exponent_bits + self.mantissa_bits)) - 1

    @property
    def rebias(self) -> int:
        """What is added to the magnitude bits to make them those of a BF16 number."""
        return self.exponent_offset << self.mantissa_bits

    @property
    def smallest(self) -> float:
        """The smallest magnitude above zero that a word can hold."""
        return 2.0 ** (1 + self.exponent_offset - BF16_EXPONENT_BIAS)

    @property
    def largest(self) -> float:
        """The largest magnitude that a word can hold."""
        top_exponent = (1 << self.exponent_bits) - 1 + self.exponent_offset - BF16_EXPONENT_BIAS
        return 2.0**top_exponent * (2.0 - 2.0**-self.mantissa_bits)


# PuzzleMoE, Algorithm 1 (arXiv 2511.04805), with the exponent moved by one so that zero has a code of its own.
WORD16 = WordLayout(
    bits=16,
    sign_bits=(15, 14),
    mask_bits=(13, 12),
    exponent_bits=5,
    mantissa_bits=BF16_MANTISSA_BITS,
    exponent_offset=111,
)

_LAYOUTS = {layout.bits: layout for layout in (WORD16,)}


def word_layout(bits: int) -> WordLayout:
    """The layout of words of `bits` bits; raises FormatError for a width that this version does not know."""
    try:
        return _LAYOUTS[bits]
    except KeyError:
        raise FormatError(f"words of {bits} bits are not supported; this version knows {sorted(_LAYOUTS)}") from None
