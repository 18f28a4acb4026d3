"""The Triton engine's decoders, word by word: PTX on an emulator, plain Triton in Triton's interpreter or on the GPU.

Of the 65,536 words those are left out that `largest_exponent` leaves out and, in float16, those with exponent field 0
and the member's mask set: by the rule they stand for 2**-16 * (1 + m / 128), but no legal word looks so.
"""

import re
from functools import cache

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from tests.kernels import ptx
from vllm_puzzle.format import find_invalid_word, unpack
from vllm_puzzle.kernels.triton.decode import decode, make_decoder

BF16, F16 = "fma.rn.bf16x2", "fma.rn.f16x2"
DTYPES = {BF16: tl.bfloat16, F16: tl.float16}
DECODERS = {fma: make_decoder(dtype, ptx=True) for fma, dtype in DTYPES.items()}
WORDS = np.arange(1 << 16, dtype=np.uint32)
PACKED = torch.from_numpy(WORDS.astype(np.uint16).view(np.int16))
EXPONENTS = WORDS >> 7 & 31

each_format = pytest.mark.parametrize("fma", DTYPES)
each_member = pytest.mark.parametrize("member", [0, 1])


def meaning(member: int) -> tuple[NDArray[np.bool_], ptx.Float]:
    """Where a member has a weight in WORDS, and its weights, spelled out from docs/format.md."""
    mask, sign = WORDS >> (13 - member) & 1, WORDS >> (15 - member) & 1
    return mask == 1, ptx.to_float(mask * (sign << 15 | (WORDS & 0x0FFF) + (111 << 7)), BF16)


@cache
def decoded_by_ptx(fma: str, member: int) -> ptx.Register:
    """WORDS decoded, a row for each of two halves and five neighbours in the other half."""
    shuffled = np.random.default_rng(0).permutation(WORDS)
    neighbours = np.stack([WORDS, WORDS ^ 0xFFFF, 0 * WORDS, 0 * WORDS + 0xFFFF, shuffled])
    registers = np.stack([WORDS | neighbours << 16, WORDS << 16 | neighbours])
    ((low, high),) = ptx.execute(DECODERS[fma].ptx[member], 1, registers)
    return np.concatenate([low & 0xFFFF, high >> 16])


@triton.jit
def decode_kernel(words, results, member: tl.constexpr, decoder: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(results + at, decode(tl.load(words + at), member, decoder).to(tl.int16, bitcast=True))


@each_format
@each_member
def test_every_word_has_its_meaning_and_plain_triton_the_same_bits(fma: str, member: int) -> None:
    decoder = DECODERS[fma]
    kept = decoder.largest_exponent >= EXPONENTS
    device = "cpu" if triton.knobs.runtime.interpret else "cuda"
    plain = torch.full((len(WORDS),), -1, dtype=torch.int16, device=device)
    plain_decoder = make_decoder(DTYPES[fma], ptx=False)
    decode_kernel[(16,)](PACKED.to(device), plain, member, plain_decoder, len(WORDS) // 16)
    row = plain.cpu().numpy().view(np.uint16)
    decoded = decoded_by_ptx(fma, member)
    held, weight = meaning(member)
    assert np.array_equal(weight, unpack(PACKED, member).double().numpy())
    defined = kept if fma == BF16 else kept & (~held | (EXPONENTS > 0))
    values = np.ldexp(ptx.to_float(decoded, fma), -decoder.scale_exponent)
    assert (values == weight)[:, defined].all()
    # What is masked is +0.0, also where a word has a sign without its mask, which is not legal.
    assert not decoded[:, kept & ~held].any()
    # Plain Triton keeps the sign of a zero that is not masked, which float16 alone reads, from no legal word.
    assert (decoded == np.where(held & (row == 0x8000), 0, row))[:, kept].all()


def test_what_is_left_out_is_not_legal_or_cannot_be_decoded() -> None:
    for word in PACKED[(EXPONENTS == 0) & (WORDS > 0)].split(1):
        assert find_invalid_word(word) is not None
    assert [DECODERS[fma].largest_exponent for fma in (BF16, F16)] == [EXPONENTS.max(), 30]
    for member in (0, 1):
        beyond = (EXPONENTS == 31) & meaning(member)[0]
        assert not np.isfinite(ptx.to_float(decoded_by_ptx(F16, member)[:, beyond], F16)).any()


@each_member
def test_bfloat16_takes_few_integer_instructions(member: int) -> None:
    _, program = ptx.instructions(DECODERS[BF16].ptx[member])
    opcodes = [opcode for opcode, _ in program if opcode not in {"mov.b32", BF16}]
    assert ptx.INTEGER.issuperset(opcodes)
    assert len(opcodes) == {0: 2, 1: 3}[member]


def test_emulated_integer_instructions() -> None:
    for table in range(256):
        body = f"{{ lop3.b32 $0, 0xF0, 0xCC, 0xAA, {table}; and.b32 $0, $0, $1; }}"
        assert ptx.execute(body, 1, np.full(1, 255, np.uint32)) == [table]
    steps = "lop3.b32 t, $2, 0x0FF0, 0xC00C, 0xEA; or.b32 t, t, 1; shl.b32 $0, t, 17; shl.b32 $1, t, 32;"
    assert ptx.execute(f"{{ .reg .b32 t; {steps} }}", 2, np.full(1, 0xFF00, np.uint32)) == [0x9E1A0000, 0]


# Ties to even; in bfloat16 just below one, by less than float64 holds; subnormal; overflow; zeros; infinities.
FMA_CASES = {
    BF16: """3FC0*3F81+0000=3FC2 3F80*3F80+3B80=3F80 3F81*3F80+3B80=3F82 3FC0*3F81+8D80=3FC1 0080*3F00+0000=0040
             0001*3F00+0000=0000 0003*3F00+0000=0002 7F7F*4000+0000=7F80 7F7F*3F80+7B00=7F80 8000*3F80+0000=0000
             8000*3F80+8000=8000 3F80*BF80+3F80=0000 7F80*0000+3F80=7FFF FF80*3F80+3F80=FF80""",
    F16: """3E00*3C01+0000=3E02 3C00*3C00+1000=3C00 3C01*3C00+1000=3C02 0400*3800+0000=0200 0001*3800+0000=0000
            0003*3800+0000=0002 7BFF*4000+0000=7C00 7BFF*3C00+4C00=7C00 8000*3C00+0000=0000 8000*3C00+8000=8000
            3C00*BC00+3C00=0000 7C00*0000+3C00=7FFF FC00*3C00+3C00=FC00""",
}


@each_format
def test_emulated_multiply_and_add(fma: str) -> None:
    cases = np.array([[int(number, 16) for number in re.split(r"\W", case)] for case in FMA_CASES[fma].split()])
    *inputs, expected = (cases | cases[::-1] << 16).astype(np.uint32).T
    assert np.array_equal(ptx.execute(f"{{ {fma} $0, $1, $2, $3; }}", 1, *inputs)[0], expected)


@pytest.mark.parametrize("statement", ["not.b32 $0, $1", "fma.rn.relu.bf16x2 $0, $1, $1, $1", "or.b32 $0, $1, t"])
def test_the_emulator_refuses_what_it_does_not_know(statement: str) -> None:
    with pytest.raises(ptx.PtxError):
        ptx.execute(f"{{ .reg .b32 t; mov.b32 $0, 0; {statement}; }}", 1, WORDS)
