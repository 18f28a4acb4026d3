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

BOTH = tl.constexpr(2)

_SIGN_BIT = 15
# How far a member's sign is from the sign of a 16-bit float; the same shift has to align the masks.
_SHIFTS = tuple(_SIGN_BIT - bit for bit in WORD16.sign_bits)
_FACTOR_BIT = WORD16.mask_bits[0] + _SHIFTS[0]
assert all(mask + shift == _FACTOR_BIT for mask, shift in zip(WORD16.mask_bits, _SHIFTS, strict=True))


@dataclass(frozen=True)
class Decoder:
    """How words become numbers of `dtype`; the compile-time side of `decode_one` and `decode_both`.

    Attributes:
        dtype: tl.bfloat16 or tl.float16.
        mantissa_shift: from a word's mantissa to the dtype's.
        exponent_bits: added to a shifted magnitude, in place, for the plain body.
        scale_exponent: decoded over stored, as a power of two.
        largest_exponent: the largest exponent field of a word that can be decoded.
        ptx: bodies for member 0, member 1 and both, or none: plain Triton.
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
        bodies = [_bfloat16_ptx(members, raised << mantissa) for members in ((0,), (1,), (0, 1))]
    else:
        exponent = 0
        one_over_factor = (bias - factor_exponent) << mantissa
        bodies = [_float16_ptx(members, one_over_factor) for members in ((0,), (1,), (0, 1))]
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


def _bfloat16_ptx(members: tuple[int, ...], raised: int) -> str:
    """Decodes two words in a register, the operand after the results, into one result per member."""
    words = f"${len(members)}"
    # (words & mask) | raised: 0xEA is the truth table of (a & b) | c.
    lines = [f"lop3.b32 magnitude, {words}, {_twice(WORD16.magnitude_mask)}, {_twice(raised)}, 0xEA;"]
    for result, member in enumerate(members):
        lines += _factor_ptx(words, member)
        lines.append(f"fma.rn.bf16x2 ${result}, magnitude, factor, zero;")
    return _body(lines)


def _float16_ptx(members: tuple[int, ...], one_over_factor: int) -> str:
    words = f"${len(members)}"
    lines = [
        f"mov.b32 unit, {_twice(one_over_factor)};",
        f"and.b32 magnitude, {words}, {_twice(WORD16.magnitude_mask)};",
        f"shl.b32 magnitude, magnitude, {10 - WORD16.mantissa_bits};",
    ]
    for result, member in enumerate(members):
        lines += _factor_ptx(words, member)
        lines.append("fma.rn.f16x2 factor, factor, unit, zero;")
        lines.append(f"fma.rn.f16x2 ${result}, magnitude, factor, zero;")
    return _body(lines)


def _factor_ptx(words: str, member: int) -> list[str]:
    factor_bits = _twice(1 << _SIGN_BIT | 1 << _FACTOR_BIT)
    if not _SHIFTS[member]:
        return [f"and.b32 factor, {words}, {factor_bits};"]
    return [f"shl.b32 factor, {words}, {_SHIFTS[member]};", f"and.b32 factor, factor, {factor_bits};"]


def _body(lines: list[str]) -> str:
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
def decode_one(words, MEMBER: tl.constexpr, DECODER: tl.constexpr):
    """The scaled weights of member 0 or 1; words: int16 of any shape."""
    if len(DECODER.ptx) > 0:
        return tl.inline_asm_elementwise(
            DECODER.ptx[MEMBER], "=r,r", [words], dtype=DECODER.dtype, is_pure=True, pack=2
        )
    else:
        return _decode_plain(words, MEMBER, DECODER)


@triton.jit
def decode_both(words, DECODER: tl.constexpr):
    """The scaled weights of members 0 and 1; words: int16 of any shape."""
    if len(DECODER.ptx) > 0:
        return tl.inline_asm_elementwise(
            DECODER.ptx[BOTH], "=&r,=&r,r", [words], dtype=(DECODER.dtype, DECODER.dtype), is_pure=True, pack=2
        )
    else:
        return _decode_plain(words, 0, DECODER), _decode_plain(words, 1, DECODER)
