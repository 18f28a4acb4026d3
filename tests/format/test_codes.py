"""Codes: they come back from their bit stream, and a codebook and scales make weights of them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_puzzle.format import (
    CODE_BITS,
    CodedShape,
    FormatError,
    check_codebook,
    decode,
    join_rows,
    num_words,
    pack_codes,
    split_rows,
    unpack_codes,
    zero_code,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CODE_BITS), st.integers(0, 7), st.integers(1, 100), st.integers(0, 2**31), st.data())
def test_codes_come_back(bits: int, rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    codes = torch.randint(1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    zero = data.draw(st.integers(0, (1 << bits) - 1))
    words = pack_codes(codes, bits, zero)
    assert (words.dtype, words.shape) == (torch.int32, (rows, num_words(columns, bits)))
    assert torch.equal(unpack_codes(words, bits, columns), codes)
    padded = unpack_codes(words, bits, words.shape[1] // bits * 32)
    assert (padded[:, columns:] == zero).all()


@pytest.mark.parametrize("bits", CODE_BITS)
def test_the_stream_is_little_endian(bits: int) -> None:
    codes = torch.randint(1 << bits, (3, 64), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    for row, words in zip(codes.tolist(), pack_codes(codes, bits, 0), strict=True):
        stream = int.from_bytes(words.numpy().tobytes(), "little")
        assert [stream >> j * bits & (1 << bits) - 1 for j in range(64)] == row


@pytest.mark.parametrize("bits", CODE_BITS)
def test_codes_come_back_through_a_file(bits: int, tmp_path: Path) -> None:
    codes = torch.randint(1 << bits, (5, 70)).to(torch.uint8)
    save_file({"packed": pack_codes(codes, bits, 1)}, tmp_path / "codes.safetensors")
    assert torch.equal(unpack_codes(load_file(tmp_path / "codes.safetensors")["packed"], bits, 70), codes)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(FormatError, match="code 16 does not fit 4 bits"):
        pack_codes(torch.full((1, 32), 16, dtype=torch.uint8), 4, 0)
    with pytest.raises(FormatError, match="codes of 7 bits are not known; they have 4, 5, 6, 8"):
        pack_codes(torch.zeros(1, 32, dtype=torch.uint8), 7, 0)
    with pytest.raises(FormatError, match="64 codes of 5 bits take 10 words a row, found 5"):
        unpack_codes(torch.zeros(1, 5, dtype=torch.int32), 5, 64)


def test_a_weight_is_its_points_coordinate_times_its_rows_scale() -> None:
    codebook = torch.tensor([[0, 0], [1, -2], [0.5, 3]], dtype=torch.bfloat16)
    scales = torch.tensor([[2, 4], [0.25, 1]], dtype=torch.bfloat16)
    first, second = decode(torch.tensor([[0, 1], [2, 1]], dtype=torch.uint8), codebook, scales)
    assert first.tolist() == [[0, 2], [2, 4]]
    assert second.tolist() == [[0, -0.5], [3, -2]]


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8])
def test_rows_of_down_meet_in_twos(num_rows: int) -> None:
    down = torch.randn(num_rows, 5)
    halves = split_rows(down)
    assert halves.shape == (2, (num_rows + 1) // 2, 5)
    assert torch.equal(halves[0, -1], down[num_rows - 1 - (num_rows + 1) % 2])
    assert torch.equal(join_rows(halves, num_rows), down)


def test_codebooks_that_no_converter_writes() -> None:
    codebook, scales = torch.zeros(16, 2, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16)
    codebook[:, 1] = torch.arange(16) - 9
    assert zero_code(codebook) == 9
    check_codebook(codebook, scales)
    with pytest.raises(FormatError, match=r"gate has no point \(0, 0\)"):
        check_codebook(codebook[:9], scales, "gate")
    with pytest.raises(FormatError, match="gate: its scales hold numbers that are not finite"):
        check_codebook(codebook, scales / 0, "gate")


def test_shapes_and_bytes() -> None:
    shape = CodedShape.of_w2(hidden_size=7, intermediate_size=40, bits=5)
    assert (shape.packed, shape.codebook) == ((4, 10), (32, 2))
    assert shape.num_bytes == 4 * 4 * 10 + 2 * 64 + 2 * 2 * 4
    assert CodedShape.of_w13(hidden_size=64, intermediate_size=40, bits=6).packed == (40, 12)
