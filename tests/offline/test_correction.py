"""Merged layers' outputs: nearer to what is wanted than without compensation, drift of earlier layers included."""

import pytest
import torch

from tests.offline.small import HIDDEN_SIZE, PackedLayer, merge_layer, slots_of, small_experts, small_tokens
from vllm_puzzle.offline.merging import rules
from vllm_puzzle.offline.merging.correction import OutputCorrection
from vllm_puzzle.offline.merging.layer import RoutedTokens
from vllm_puzzle.offline.merging.pair import ElementRule
from vllm_puzzle.offline.merging.recipe import Recipe
from vllm_puzzle.offline.merging.saliency import measure_saliency

PAIRS = [(0, 3), (1, 2), (4, 5)]
SALIENCY, COMPENSATED = Recipe(rules.SALIENCY), Recipe(rules.COMPENSATED)
DIRECTION = torch.nn.functional.normalize(torch.randn(HIDDEN_SIZE, generator=torch.Generator().manual_seed(9)), dim=0)


@pytest.fixture(scope="module")
def routed() -> RoutedTokens:
    return small_tokens(900)


def merged(recipe: Recipe, routed: RoutedTokens, lacking: torch.Tensor) -> PackedLayer:
    experts = small_experts()
    return merge_layer(experts, slots_of(PAIRS), recipe, routed, lacking)


@pytest.mark.parametrize("align", [False, True])
def test_a_compensated_layer_answers_more_like_the_source(align: bool, routed: RoutedTokens) -> None:
    wanted = routed.through(small_experts())

    def error(rule: str) -> float:
        packed = merged(Recipe(rules.RULES[rule], align), routed, torch.zeros_like(wanted))
        return float((routed.through(packed.experts) - wanted).norm() / wanted.norm())

    assert error("compensated") < 0.6 * error("saliency")


def test_part_of_a_drift_is_given_back(routed: RoutedTokens) -> None:
    answer = routed.through(small_experts())
    drift = answer.norm(dim=1).mean() * DIRECTION.expand_as(answer)
    packed = merged(COMPENSATED, routed, drift.clone())
    blind = merged(COMPENSATED, routed, torch.zeros_like(answer))
    left, all_of_it = (answer + drift - routed.through(layer.experts) for layer in (packed, blind))
    assert 0 < float((left @ DIRECTION).mean()) < 0.85 * float((all_of_it @ DIRECTION).mean())
    # And not at the cost of everything else.
    assert float(left.norm()) < 0.85 * float(all_of_it.norm())


@pytest.mark.parametrize("align", [False, True])
def test_what_is_lacking_is_known_exactly_after_every_pair(align: bool, routed: RoutedTokens) -> None:
    answer = routed.through(small_experts())
    drift = 0.3 * answer.norm(dim=1).mean() * DIRECTION.expand_as(answer)
    lacking = drift.clone()
    packed = merged(Recipe(rules.COMPENSATED, align), routed, lacking)
    left = answer + drift - routed.through(packed.experts)
    assert float((lacking - left).norm()) < 1e-3 * float(left.norm())


def test_later_pairs_make_up_for_earlier_ones(routed: RoutedTokens) -> None:
    """Expert 0 has lost much to its mate when expert 4, which fires with it, is merged."""
    experts = small_experts()
    experts.down[3] = experts.down[3] * 8
    choices = torch.tensor([[0, 4], [3, 2]])[torch.arange(len(routed)) % 2]
    alternating = RoutedTokens(routed.hidden, choices, routed.topk_weights)
    after_a_pair, alone = (
        merge_layer(
            experts.copy(),
            slots_of(pairs),
            COMPENSATED,
            alternating,
            torch.zeros_like(routed.hidden),
        ).experts
        for pairs in ([(0, 3), (4, 5)], [(4, 5)])
    )
    assert torch.equal(after_a_pair.gate[4], alone.gate[4])
    ignorant = after_a_pair.copy()
    ignorant.down[4] = alone.down[4]
    wanted = alternating.through(experts)
    errors = [float((alternating.through(layer) - wanted)[::2].norm()) for layer in (after_a_pair, ignorant)]
    assert errors[0] < 0.95 * errors[1]


def test_down_is_asked_to_make_up_for_gate_and_up(routed: RoutedTokens) -> None:
    experts, pair = small_experts(), (4, 1)
    merged_pair = ElementRule.of_saliency(
        [measure_saliency(experts, expert, routed, full=False) for expert in pair]
    ).merge(experts, pair)
    correction = OutputCorrection(experts, routed, torch.zeros_like(routed.hidden))
    for member, expert in enumerate(pair):
        full = measure_saliency(experts, expert, routed, full=True)
        asked, moment = correction.ask(expert, merged_pair, member, full)
        tokens, weights = routed.of(expert)
        read = merged_pair.intermediate(member, routed.hidden[tokens]) * weights[:, None]
        answers = experts.output(expert, routed.hidden[tokens]) * weights[:, None]
        errors = [float((read @ down.T - answers).norm()) for down in (asked, experts.down[expert].float())]
        assert errors[0] < 0.7 * errors[1]
        # What compensating its columns will count is what it will read, but for the shrinkage.
        share = len(moment) / (len(moment) + len(tokens))
        expected = (1 - share) * read.T @ read + share * full.intermediate
        torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
@pytest.mark.parametrize("align", [False, True])
def test_few_tokens_do_not_make_weights_explode(align: bool, num_tokens: int) -> None:
    """Far fewer than there are inputs, so they tell of few directions alone; as much is lacking as comes out."""
    experts, few = small_experts(), small_tokens(num_tokens)
    output = few.through(experts)
    lacking = output.norm() / num_tokens**0.5 * DIRECTION.expand_as(output)
    packed = merge_layer(experts, slots_of(PAIRS), Recipe(rules.COMPENSATED, align), few, lacking.clone())
    assert packed.statistics.relative_error < 0.5
    left = lacking + output - few.through(packed.experts)
    assert float(left.norm()) < 0.8 * float(lacking.norm())


def test_an_expert_alone_stays_as_it_was(routed: RoutedTokens) -> None:
    experts = small_experts()
    drift = DIRECTION.repeat(len(routed), 1)
    packed = merge_layer(experts, slots_of([(0, 3)]), COMPENSATED, routed, drift)
    for expert in (1, 2, 4, 5):
        for got, own in zip(packed.experts.matrices(expert), experts.matrices(expert), strict=True):
            # Magnitudes below the smallest storable one are raised or dropped.
            torch.testing.assert_close(got, own, rtol=0, atol=2.0**-15)


@pytest.mark.parametrize("recipe", [Recipe(rules.COMPENSATED), Recipe(rules.COMPENSATED, align=True)])
def test_mates_without_any_weight_are_merged_too(recipe: Recipe, routed: RoutedTokens) -> None:
    """Nothing comes out of them whatever goes in, so no regression can tell what their down should be."""
    experts = small_experts()
    for expert in (1, 2):
        for matrices in (experts.gate, experts.up, experts.down):
            matrices[expert] = torch.zeros_like(matrices[expert])
    packed = merge_layer(experts, slots_of(PAIRS), recipe, routed, torch.zeros(len(routed), HIDDEN_SIZE))
    for expert in (1, 2):
        assert bool(routed.through(packed.experts).isfinite().all())
        assert float(packed.experts.output(expert, routed.hidden).abs().max()) == 0


@pytest.mark.parametrize("loudness", [10, 1000])
def test_a_loud_expert_does_not_spoil_those_after_it(loudness: int, routed: RoutedTokens) -> None:
    """What it lost is noise to them, and far more than they give themselves."""
    experts = small_experts()
    output = routed.through(experts)
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    lost = loudness * noise * output.norm() / noise.norm()
    after, alone = (merged(COMPENSATED, routed, lacking).experts for lacking in (lost, torch.zeros_like(output)))
    for expert, down in enumerate(experts.down):
        errors = [float((layer.down[expert] - down).norm()) for layer in (after, alone)]
        assert errors[0] < 1.1 * errors[1]
