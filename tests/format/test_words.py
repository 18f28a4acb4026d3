"""pack and unpack: exact for everything a word can hold, and a refusal for everything else."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_puzzle.format import WORD16, FormatError, find_invalid_word, nearest_magnitude, pack, pack_single, unpack
from vllm_puzzle.format.layout import word_layout

SMALLEST, LARGEST = 2.0**-15, 65280.0


def all_magnitudes() -> torch.Tensor:
    """Every BF16 number that a word can hold, zero included: 31 exponents of 128 mantissas, and one."""
    bits = torch.arange(112 << 7, 143 << 7, dtype=torch.int32).to(torch.int16)
    return torch.cat([torch.zeros(1, dtype=torch.bfloat16), bits.view(torch.bfloat16)])


def scalar_decode(word: int, member: int) -> float:
    """The definition of a word, written down bit by bit without any of the package's constants."""
    mask, sign = (word >> (13 - member)) & 1, (word >> (15 - member)) & 1
    if not mask:
        return 0.0
    exponent, mantissa = (word >> 7) & 31, word & 127
    return (-1.0) ** sign * 2.0 ** (exponent + 111 - 127) * (1 + mantissa / 128)


def test_limits_are_those_of_the_specification() -> None:
    assert (WORD16.smallest, WORD16.largest) == (SMALLEST, LARGEST)


def test_every_magnitude_with_every_sign_and_mask_comes_back_exactly() -> None:
    magnitudes = all_magnitudes()
    for code in range(16):
        flags = [torch.full(magnitudes.shape, bool((code >> bit) & 1)) for bit in range(4)]
        words = pack(magnitudes, flags[:2], flags[2:])
        assert find_invalid_word(words) is None
        for member in (0, 1):
            signed = torch.where(flags[2 + member], -magnitudes, magnitudes)
            # A zero has no mask and so no sign: it is +0.0, bit for bit.
            expected = torch.where(flags[member] & (magnitudes != 0), signed, torch.zeros_like(signed))
            assert torch.equal(unpack(words, member).view(torch.int16), expected.view(torch.int16))


def test_unpack_follows_the_definition_for_all_words() -> None:
    words = torch.arange(1 << 16, dtype=torch.int32)
    for member in (0, 1):
        expected = torch.tensor([scalar_decode(word, member) for word in words.tolist()], dtype=torch.float32)
        # An exponent field of 0 decodes like any other, though it is never written: 2^-16 and up.
        assert torch.equal(unpack(words.to(torch.int16), member).float(), expected)


@pytest.mark.heavy
def test_words_that_are_never_written_are_found() -> None:
    words = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    magnitudes = all_magnitudes()
    written = set()
    for code in range(16):
        flags = [torch.full(magnitudes.shape, bool((code >> bit) & 1)) for bit in range(4)]
        written |= set(pack(magnitudes, flags[:2], flags[2:]).tolist())
    found = {int(word) for word in words if find_invalid_word(word[None]) is None}
    assert found == written


@given(st.lists(st.floats(min_value=-LARGEST, max_value=LARGEST, width=32), min_size=1, max_size=64))
def test_a_single_weight_becomes_the_nearest_storable_one(values: list[float]) -> None:
    weight = torch.tensor(values)
    decoded = unpack(pack_single(weight), 0)
    candidates = torch.cat([-all_magnitudes().flip(0), all_magnitudes()]).double()
    for value, got in zip(weight.double(), decoded.double(), strict=True):
        best = (candidates - value).abs().min()
        # Rounding to BF16 first can turn the middle between 0 and the smallest magnitude into a tie.
        assert (got - value).abs() <= best + SMALLEST * 2**-9


@pytest.mark.parametrize(
    ("magnitude", "stored"),
    [
        (0.0, 0.0),
        (2.0**-17, 0.0),
        (math.nextafter(2.0**-16, 0) * 0.99, 0.0),
        (2.0**-16, SMALLEST),
        (2.0**-15, SMALLEST),
        (1.3, 1.296875),
        (LARGEST, LARGEST),
    ],
)
def test_small_magnitudes_are_raised_or_dropped_whichever_is_nearer(magnitude: float, stored: float) -> None:
    assert nearest_magnitude(torch.tensor([magnitude])).item() == stored


@pytest.mark.parametrize("value", [65536.0, -65536.0, 1e30, math.inf, -math.inf, math.nan])
def test_what_cannot_be_stored_is_refused_with_tensor_and_index(value: float) -> None:
    weight = torch.ones(3, 5)
    weight[1, 4] = value
    with pytest.raises(FormatError, match=r"experts\.7\.w1\.weight\[1, 4\] is .*65280"):
        pack_single(weight, name="experts.7.w1.weight")


@given(st.sampled_from([(0,), (1,), (830, 545), (511, 350), (7, 1, 3), (2, 0)]), st.integers(0, 2**32 - 1))
def test_odd_shapes_and_strides(shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).bfloat16().transpose(0, -1)
    words = pack_single(weight)
    assert words.shape == weight.shape
    assert words.dtype == torch.int16
    raised = weight.abs() < SMALLEST
    assert torch.equal(unpack(words, 0)[~raised], weight[~raised])
    assert not unpack(words, 1).any()


def test_words_survive_a_file(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    magnitude = torch.rand(31, 17, generator=generator)
    masks = [torch.rand(31, 17, generator=generator) < 0.8 for _ in range(2)]
    signs = [torch.rand(31, 17, generator=generator) < 0.5 for _ in range(2)]
    words = pack(magnitude, masks, signs)
    save_file({"a": words}, tmp_path / "words.safetensors")
    assert torch.equal(load_file(tmp_path / "words.safetensors")["a"], words)


def test_another_width_is_refused() -> None:
    with pytest.raises(FormatError, match="words of 8 bits are not supported"):
        word_layout(8)
