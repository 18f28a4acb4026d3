"""The GPU benchmark where there is no GPU: what it counts and what it refuses. Nothing is timed."""

import sys

import pytest
import torch

from benchmarks.gpu_moe.__main__ import main
from benchmarks.gpu_moe.peers import bytes_moved, fp8_blocks
from vllm_puzzle.tuning.shape import LayerShape

# An expert has 3 * 4 * 8 = 96 weights.
SHAPE = LayerShape("small", num_experts=8, hidden_size=4, intermediate_size=8, top_k=4)


def test_bytes_by_hand() -> None:
    # Four experts of three slots; two tokens in and out, 4 values of 2 bytes each.
    ids = torch.tensor([[0, 1, 2, 7], [1, 0, 7, 2]], dtype=torch.int32)
    assert bytes_moved(SHAPE, ids, 2, per_slot=True) == 3 * 96 * 2 + 2 * 2 * 4 * 2
    assert bytes_moved(SHAPE, ids, 2, per_slot=False) == 4 * 96 * 2 + 2 * 2 * 4 * 2
    assert bytes_moved(SHAPE, ids, 1, per_slot=False) == 4 * 96 + 2 * 2 * 4 * 2


def test_fp8_blocks_have_their_own_scales() -> None:
    weights = torch.randn(2, 256, 128).bfloat16()
    weights[1, 128:] *= 1000
    rounded, scales = fp8_blocks(weights, torch.float8_e4m3fn)
    assert (rounded.shape, scales.shape) == (weights.shape, (2, 2, 1))
    restored = rounded.float() * scales.repeat_interleave(128, 1).repeat_interleave(128, 2)
    # Three bits after the leading one.
    assert ((restored - weights.float()).abs() <= weights.float().abs() / 16 + scales.max() * 2**-9).all()
    largest = weights[1, 128:].float().abs().max()
    assert scales[1, 1].item() == pytest.approx(largest.item() / 448)


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        ([], 1, "torch finds none here"),
        (["--tokens", "0"], 2, "at least 1"),
        (["--shapes", "Nobody"], 2, "invalid choice"),
    ],
)
def test_without_a_card_it_says_so_and_does_nothing(
    arguments: list[str],
    status: int,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("benchmarks.gpu_moe.__main__.Clock", lambda: pytest.fail("it began to work"))
    monkeypatch.setattr(sys, "argv", ["gpu_moe", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == status
    output = capsys.readouterr()
    assert (output.out, sentence in output.err) == ("", True)
    assert status == 2 or output.err.count("\n") == 1
