"""Peers that store every weight in fewer bits: what their weights lie on, and which of them loses less."""

import pytest
import torch

from tests.benchmarks.quality.layers import MATRICES, NUM_EXPERTS, compress, random_experts, random_tokens


def loss(slug: str) -> float:
    experts, tokens = random_experts(), random_tokens()
    return tokens.relative_output_error(experts, compress(slug, experts, tokens).experts)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["rtn", "gptq"])
@pytest.mark.parametrize("suffix", ["", "-asymmetric"])
def test_integers_are_multiples_of_a_scale(bits: int, kind: str, suffix: str) -> None:
    experts, tokens = random_experts(), random_tokens()
    rounded = compress(f"{kind}-int{bits}{suffix}", experts, tokens).experts
    for name in MATRICES:
        for matrix in getattr(rounded, name):
            for row in matrix:
                values = row.unique()
                assert len(values) <= 1 << bits
                steps = values.diff()
                assert torch.allclose(steps / steps.min(), (steps / steps.min()).round(), atol=1e-3)


def test_compensation_loses_less_than_the_nearest() -> None:
    for bits in (2, 3, 4):
        for suffix in ("", "-asymmetric"):
            assert loss(f"gptq-int{bits}{suffix}") < 0.8 * loss(f"rtn-int{bits}{suffix}")


def test_more_bits_lose_less() -> None:
    for series in (
        ["gptq-int2", "gptq-int3", "gptq-int4"],
        ["levels-2", "levels-2.5", "levels-3", "levels-4"],
        ["rays-2", "rays-2.5", "rays-3"],
    ):
        losses = [loss(slug) for slug in series]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.6 * losses[0]


def test_levels_are_the_layers_own() -> None:
    experts, tokens = random_experts(), random_tokens()
    fitted = compress("levels-2.5", experts, tokens).experts
    for name, count in (("gate", 6), ("up", 6), ("down", 5)):
        assert all(len(row.unique()) <= count for matrix in getattr(fitted, name) for row in matrix)
    # Up to each row's scale every row of gate and up has the same levels, whichever expert it is of.
    rows = torch.cat([*fitted.gate, *fitted.up]).abs()
    largest = rows.amax(dim=1, keepdim=True)
    levels = (rows / largest * 1000).round().unique()
    assert len(levels) <= 2 * 6 * 6


def test_rays_share_a_magnitude_or_leave_a_mate_out() -> None:
    experts, tokens = random_experts(), random_tokens()
    made = compress("rays-2", experts, tokens).experts
    zeros = sum(float((matrix == 0).float().mean()) for matrix in made.gate) / NUM_EXPERTS
    assert 0.1 < zeros < 0.6
    for matrix in made.gate:
        for row in matrix:
            # Two magnitudes on each of the two rays that an expert has a part in.
            assert len(row.abs().unique()) <= 5


def test_the_mixture_gives_bits_where_tokens_are() -> None:
    experts, tokens = random_experts(), random_tokens(unused=(6, 7))
    made = compress("mc-moe", experts, tokens)
    levels = [max(len(row.unique()) for row in made.experts.gate[expert]) for expert in range(NUM_EXPERTS)]
    assert levels[6] <= 4
    assert levels[7] <= 4
    assert max(levels[:6]) > 4
    scales = made.bits - 2.5
    assert 0 < scales < 2
    assert made.bits < compress("gptq-int3-asymmetric", experts, tokens).bits
