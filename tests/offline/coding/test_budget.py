"""Bits by loss: within the budget, nearly the least loss, and nobody starved."""

from collections.abc import Mapping, Sequence
from itertools import product

import pytest
import torch

from tests.offline.small import NUM_EXPERTS, small_experts, small_tokens
from vllm_puzzle.format import CODE_BITS, LayerCodes
from vllm_puzzle.offline.coding.budget import bytes_at, expert_bytes, hardly_seen, spend_bits
from vllm_puzzle.offline.coding.code_layer import code_layer
from vllm_puzzle.offline.coding.losses import estimate_coding_losses
from vllm_puzzle.offline.merging.layer import ExpertWeights, LayerTokens, RoutedTokens
from vllm_puzzle.offline.merging.saliency import measure_saliency

SIZES = expert_bytes(64, 32)


def losses_of(*usage: float) -> list[dict[int, float]]:
    """A layer's losses, which halve with every bit of a code."""
    return [{bits: used * 2.0**-bits for bits in CODE_BITS} for used in usage]


def spent(codes: Mapping[int, LayerCodes]) -> int:
    return sum(SIZES[bits] for layer in codes.values() for bits in layer.w13_bits)


def lost(losses: Mapping[int, Sequence[Mapping[int, float]]], codes: Mapping[int, LayerCodes]) -> float:
    return sum(
        experts[expert][bits] for layer, experts in losses.items() for expert, bits in enumerate(codes[layer].w13_bits)
    )


def test_an_expert_takes_codes_codebooks_and_scales() -> None:
    # 3 * 64 * 32 weights at half of 5 bits, two codebooks of 32 points, 32 * 2 + 64 scales; 4 and 2 bytes.
    assert expert_bytes(64, 32)[5] == 3 * 64 * 32 * 5 // 2 // 8 + 2 * 32 * 4 + (32 * 2 + 64) * 2


@pytest.mark.parametrize("bits", [2, 2.2, 2.5, 2.9, 3, 3.5, 3.9, 4])
def test_the_budget_is_kept_and_nearly_used_up(bits: float) -> None:
    generator = torch.Generator().manual_seed(0)
    losses = {layer: losses_of(*torch.randn(16, generator=generator).exp().tolist()) for layer in (0, 3, 4)}
    codes = spend_bits(losses, bits, SIZES, even=False)
    budget = 48 * bytes_at(bits, SIZES)
    assert spent(codes) <= budget
    assert spent(codes) > budget - (SIZES[8] - SIZES[6])
    for layer, each in codes.items():
        assert (each.layer, each.num_experts) == (layer, 16)
        assert each.w13_bits == each.w2_bits


@pytest.mark.parametrize("bits", [2.3, 2.5, 3.0, 3.4])
def test_little_is_lost_against_the_best_of_all_assignments(bits: float) -> None:
    losses = {0: losses_of(8, 1, 0.5), 1: losses_of(3, 0.2, 1)}
    best = min(
        lost(losses, codes)
        for row in product(CODE_BITS, repeat=6)
        for codes in [
            {i: LayerCodes(layer=i, w13_bits=list(row[3 * i :][:3]), w2_bits=list(row[3 * i :][:3])) for i in (0, 1)}
        ]
        if spent(codes) <= 6 * bytes_at(bits, SIZES)
    )
    assert lost(losses, spend_bits(losses, bits, SIZES, even=False)) < 1.1 * best


def test_experts_that_are_used_more_get_more() -> None:
    losses = {0: losses_of(16, 1, 1, 1), 1: losses_of(1, 1, 1, 0.01)}
    codes = spend_bits(losses, 2.5, SIZES, even=False)
    assert codes[0].w13_bits[0] > codes[0].w13_bits[1]
    assert codes[1].w13_bits[3] == 4
    even = {layer: LayerCodes.even(layer, 4, 5) for layer in losses}
    assert lost(losses, codes) < 0.75 * lost(losses, even)


def test_even_layers_have_one_width_and_differ_where_the_bits_do() -> None:
    losses = {0: losses_of(9, 30, 1, 2), 1: losses_of(1, 1, 1, 1), 2: losses_of(1, 2, 1, 1)}
    for bits, width in ((2, 4), (2.5, 5), (3, 6), (4, 8)):
        codes = spend_bits(losses, bits, SIZES, even=True)
        assert codes == {layer: LayerCodes.even(layer, 4, width) for layer in losses}
    codes = spend_bits(losses, 2.7, SIZES, even=True)
    assert all(each.is_even for each in codes.values())
    assert codes[0].w13_bits[0] > codes[1].w13_bits[0]
    assert spent(codes) <= 12 * bytes_at(2.7, SIZES)


def test_an_expert_that_was_hardly_seen_is_not_starved() -> None:
    losses = {0: losses_of(*[10.0] * 9, 1e-6, 1e-6), 1: losses_of(*[1.0] * 11)}
    assert spend_bits(losses, 3, SIZES, even=False)[0].w13_bits[9:] == [4, 4]
    codes = spend_bits(losses, 3, SIZES, even=False, rare={0: [9]})
    places = [CODE_BITS.index(bits) for bits in codes[0].w13_bits]
    assert places[9] >= sum(places) / len(places) - 1
    assert places[10] == 0
    assert spent(codes) <= 22 * bytes_at(3, SIZES)


def test_who_was_hardly_seen() -> None:
    ids = torch.tensor([[0], [0], [0], [0], [0], [1], [1], [1], [1], [2]])
    routed = RoutedTokens(torch.zeros(10, 4), ids, torch.ones(10, 1))
    assert hardly_seen(routed, 4) == [3]
    assert hardly_seen(RoutedTokens(torch.zeros(30, 4), ids.repeat(3, 1), torch.ones(30, 1)), 3) == []


@pytest.fixture(scope="module")
def layer() -> tuple[ExpertWeights, LayerTokens]:
    experts, routed = small_experts(hidden_size=96, intermediate_size=48), small_tokens(3000, hidden_size=96)
    return experts, LayerTokens(routed, energy=float(routed.through(experts).square().sum()))


def estimates(layer: tuple[ExpertWeights, LayerTokens], full: bool, bits: int) -> torch.Tensor:
    experts, tokens = layer
    return torch.tensor(
        [
            estimate_coding_losses(experts, each, measure_saliency(experts, each, tokens.routed, full), tokens)[bits]
            for each in range(NUM_EXPERTS)
        ]
    )


def test_losses_are_near_what_coding_then_costs(layer: tuple[ExpertWeights, LayerTokens]) -> None:
    experts, tokens = layer
    coded = ExpertWeights.unread(NUM_EXPERTS, experts.activation)
    code_layer(
        experts.matrices,
        experts.activation,
        [["gate", "up", "down"]] * NUM_EXPERTS,
        LayerCodes.even(0, NUM_EXPERTS, 5),
        lambda expert, made: coded.put(expert, made.matrices()),
        tokens,
    )
    change = tokens.routed.through(coded) - tokens.routed.through(experts)
    cost = float(change.square().sum()) / tokens.energy
    # Less, since inputs of five directions leave more to descent than a real model's.
    assert 0.6 < cost / float(estimates(layer, True, 5).sum()) < 1.05


def test_the_diagonal_tells_experts_apart_as_well(layer: tuple[ExpertWeights, LayerTokens]) -> None:
    full, diagonal = (estimates(layer, each, 5) for each in (True, False))
    assert float(full.max()) > 2 * float(full.min())
    torch.testing.assert_close(diagonal / diagonal.sum(), full / full.sum(), rtol=0.25, atol=0)


def test_without_tokens_losses_are_those_of_the_weights() -> None:
    experts = small_experts(hidden_size=64, intermediate_size=40)
    losses = estimate_coding_losses(experts, 0, measure_saliency(experts, 0, None, full=False), None)
    weight = sum(float(matrix.float().square().sum()) for matrix in experts.matrices(0))
    assert list(losses) == list(CODE_BITS)
    assert 0.05 < losses[4] / weight < 0.12
    assert losses[8] < 0.1 * losses[4]
