"""Decoding packed words in registers: one meaning, a body in plain Triton and one in PTX, both from the word's layout.

A decoder gives `weight * 2**scale_exponent` in the dtype of the activations, exactly, for every word that the dtype can
take; the scale is undone once, on the accumulator. It falls out of how the PTX body works:

- `factor`, a member's sign and mask bits alone, is itself a floating-point number: zero where the mask is clear, plus
  or minus a power of two where it is set. Member 0's bits lie where bfloat16 and float16 keep their sign and an
  exponent bit; member 1's are shifted there, two words in one instruction.
- `magnitude`, exponent and mantissa, is made a normal number large enough for the product to be normal too: in bfloat16
  by setting unused high exponent bits. float16 has none to spare, so there `factor` is multiplied up to 1 first.
- One packed multiplication gives two decoded elements. It runs on the floating-point pipe, beside the integer pipe that
  spreading masks by shifts and permutes would fill.

In bfloat16 a register of two words costs 2 integer instructions for member 0, 3 for member 1 and 4 for both.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from vllm_puzzle.format import WORD16

_SIGN_BIT = 15
# How far a member's sign is from the sign of a 16-bit float; the same shift has to align the masks.
_SHIFTS = tuple(_SIGN_BIT - bit for bit in WORD16.sign_bits)
_FACTOR_BIT = WORD16.mask_bits[0] + _SHIFTS[0]
assert all(mask + shift == _FACTOR_BIT for mask, shift in zip(WORD16.mask_bits, _SHIFTS, strict=True))


@dataclass(frozen=True)
class Decoder:
    """How words become numbers of `dtype`; the compile-time side of `decode`.

    Attributes:
        dtype: tl.bfloat16 or tl.float16.
        mantissa_shift: from a word's mantissa to the dtype's.
        exponent_bits: added to a shifted magnitude, in place, for the plain body.
        scale_exponent: decoded over stored, as a power of two.
        largest_exponent: the largest exponent field of a word that can be decoded.
        ptx: bodies for member 0 and member 1, or none: plain Triton.
    """

    dtype: tl.dtype
    mantissa_shift: int
    exponent_bits: int
    scale_exponent: int
    largest_exponent: int
    ptx: tuple[str, ...]


def make_decoder(dtype: tl.dtype, ptx: bool) -> Decoder:
    """The decoder for activations of `dtype`, tl.bfloat16 or tl.float16."""
    width = {tl.bfloat16: 8, tl.float16: 5}[dtype]
    mantissa = _SIGN_BIT - width
    bias = (1 << (width - 1)) - 1
    # `factor` is 2**factor_exponent.
    factor_exponent = (1 << (_FACTOR_BIT - mantissa)) - bias
    if width > WORD16.exponent_bits:
        # Above all exponent bits of a word, so that setting it is one logic instruction with isolating them; such
        # values are multiples of 32, and of those with normal and finite products this one is closest to 1.
        raised = 5 << WORD16.exponent_bits
        exponent = raised + factor_exponent
        bodies = [_bfloat16_ptx(member, raised << mantissa) for member in (0, 1)]
    else:
        exponent = 0
        one_over_factor = (bias - factor_exponent) << mantissa
        bodies = [_float16_ptx(member, one_over_factor) for member in (0, 1)]
    word_bias = 127 - WORD16.exponent_offset
    return Decoder(
        dtype=dtype,
        mantissa_shift=mantissa - WORD16.mantissa_bits,
        exponent_bits=exponent << mantissa,
        scale_exponent=exponent - bias + word_bias,
        # Field 2**width - 1 is infinity.
        largest_exponent=min((1 << WORD16.exponent_bits) - 1, (1 << width) - 2),
        ptx=tuple(bodies) if ptx else (),
    )


def _bfloat16_ptx(member: int, raised: int) -> str:
    """Decodes two words in a register, $1, into $0."""
    return _body(
        # (words & mask) | raised: 0xEA is the truth table of (a & b) | c.
        f"lop3.b32 magnitude, $1, {_twice(WORD16.magnitude_mask)}, {_twice(raised)}, 0xEA;",
        *_factor_ptx(member),
        "fma.rn.bf16x2 $0, magnitude, factor, zero;",
    )


def _float16_ptx(member: int, one_over_factor: int) -> str:
    return _body(
        f"and.b32 magnitude, $1, {_twice(WORD16.magnitude_mask)};",
        f"shl.b32 magnitude, magnitude, {10 - WORD16.mantissa_bits};",
        *_factor_ptx(member),
        f"mov.b32 unit, {_twice(one_over_factor)};",
        "fma.rn.f16x2 factor, factor, unit, zero;",
        "fma.rn.f16x2 $0, magnitude, factor, zero;",
    )


def _factor_ptx(member: int) -> list[str]:
    factor_bits = _twice(1 << _SIGN_BIT | 1 << _FACTOR_BIT)
    if not _SHIFTS[member]:
        return [f"and.b32 factor, $1, {factor_bits};"]
    return [f"shl.b32 factor, $1, {_SHIFTS[member]};", f"and.b32 factor, factor, {factor_bits};"]


def _body(*lines: str) -> str:
    return "{ .reg .b32 magnitude, factor, unit, zero; mov.b32 zero, 0; " + " ".join(lines) + " }"


def _twice(half: int) -> str:
    return f"0x{half << 16 | half:08X}"


_MAGNITUDE = tl.constexpr(WORD16.magnitude_mask)
_SIGN_SHIFTS = tl.constexpr(_SHIFTS)
_MASK_SHIFTS = tl.constexpr(tuple(_SIGN_BIT - bit for bit in WORD16.mask_bits))
_TOP_BIT = tl.constexpr(_SIGN_BIT)
_SIGN = tl.constexpr(-(1 << _SIGN_BIT))


@triton.jit
def _decode_plain(words, MEMBER: tl.constexpr, DECODER: tl.constexpr):
    # An arithmetic shift spreads the mask's bit over the word.
    mask = (words << _MASK_SHIFTS[MEMBER]) >> _TOP_BIT
    sign = (words << _SIGN_SHIFTS[MEMBER]) & _SIGN
    magnitude = ((words & _MAGNITUDE) << DECODER.mantissa_shift) + DECODER.exponent_bits
    return ((magnitude | sign) & mask).to(DECODER.dtype, bitcast=True)


@triton.jit
def decode(words, MEMBER: tl.constexpr, DECODER: tl.constexpr):
    """The scaled weights of member 0 or 1; words: int16 of any shape.

    Both members of the same words share `magnitude`, which the assembler computes once.
    """
    if len(DECODER.ptx) > 0:
        return tl.inline_asm_elementwise(
            DECODER.ptx[MEMBER], "=r,r", [words], dtype=DECODER.dtype, is_pure=True, pack=2
        )
    else:
        return _decode_plain(words, MEMBER, DECODER)
