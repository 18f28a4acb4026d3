"""The paper's rule, compared with its definition written out element by element; and what every rule has in common."""

import math
from collections.abc import Sequence
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import silu

from tests.offline.small import (
    EVERY_RECIPE,
    NUM_EXPERTS,
    merge_layer,
    recipe_name,
    slots_of,
    small_experts,
    small_tokens,
)
from vllm_puzzle.format import FormatError, unpack
from vllm_puzzle.offline.merging import rules
from vllm_puzzle.offline.merging.compensation import compensate_columns
from vllm_puzzle.offline.merging.correction import OutputCorrection
from vllm_puzzle.offline.merging.elements import cheapest, paper_rule
from vllm_puzzle.offline.merging.layer import ExpertWeights
from vllm_puzzle.offline.merging.pair import (
    ElementRule,
    MergeStatistics,
    align_mates,
    count_changes,
    merge_by_compensation,
    pack_members,
)
from vllm_puzzle.offline.merging.recipe import Recipe
from vllm_puzzle.offline.merging.saliency import InputNorms, measure_saliency

# BF16 values of both signs, zeros, equal and nearly equal magnitudes among them.
elements = st.sampled_from([0.0, -0.0, 0.5, -0.5, 0.25, 0.21875, -1.0, 0.4296875, 3.0, -0.0625, 2.0**-15])
norms = st.sampled_from([0.0, 0.5, 1.0, 2.0])


def scalar_rule(wi: float, wj: float, ni: float, nj: float, tau: float) -> tuple[float, float]:
    """The two experts' reconstructed weights (the table in section 3 of arXiv 2511.04805), zeros staying zeros."""
    a, b = abs(wi), abs(wj)
    similar = a + b > 0 and abs(a - b) / (a + b) <= tau
    salient_i = a * ni >= b * nj
    magnitude = (a + b) / 2 if similar else (a if salient_i else b)
    return (
        math.copysign(magnitude, wi) if similar or salient_i else 0.0,
        math.copysign(magnitude, wj) if similar or not salient_i else 0.0,
    )


def merge_by_the_paper(
    experts: ExpertWeights, norms: Sequence[InputNorms], tau: float = 0.4
) -> list[tuple[torch.Tensor, MergeStatistics]]:
    """The words of gate, up and down of experts 0 and 1, and what merging changed."""
    rule = ElementRule.of_the_paper(norms, tau)
    packed = list(rule.pack(experts, (0, 1), ["gate", "up", "down"]))
    merged = rule.merge(experts, (0, 1))
    for (words, statistics), matrices, sources in zip(
        packed, (merged.gate, merged.up, merged.down), (experts.gate, experts.up, experts.down), strict=True
    ):
        assert torch.equal(words, pack_members(matrices, "a"))
        # Whoever merged and packed counted alike, and added in another order.
        assert asdict(statistics) == pytest.approx(asdict(count_changes(words, sources)), rel=1e-5, abs=1e-12)
    return packed


@given(st.lists(st.tuples(elements, elements), min_size=1, max_size=12), norms, norms, st.sampled_from([0.0, 0.3, 0.4]))
def test_paper_rule(pairs: list[tuple[float, float]], ni: float, nj: float, tau: float) -> None:
    """One neuron, so that gate and up are a row and down is a column."""
    rows = [torch.tensor([[pair[member] for pair in pairs]]).bfloat16() for member in (0, 1)]
    experts = ExpertWeights(list(rows), [row.flip(1) for row in rows], [row.T for row in rows], silu)
    channels = [(torch.full((len(pairs),), norm), torch.full((1,), norm)) for norm in (ni, nj)]
    gate, up, down = merge_by_the_paper(experts, channels, tau)
    expected = [scalar_rule(wi, wj, ni, nj, tau) for wi, wj in pairs]
    kept = sum(value != 0 for pair in expected for value in pair)
    for words, statistics in ((gate[0], gate[1]), (up[0].flip(1), up[1]), (down[0].T, down[1])):
        for member in (0, 1):
            decoded = unpack(words, member)[0].tolist()
            rounded = [torch.tensor(pair[member]).bfloat16().item() + 0.0 for pair in expected]
            assert decoded == rounded
        assert (statistics.elements, statistics.kept) == (len(pairs), kept)


def test_each_input_channel_has_its_own_norm() -> None:
    weights = [torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([[-4.0, -4.0], [4.0, 4.0]])]
    uneven, even = torch.tensor([8.0, 1.0]), torch.ones(2)
    first_column = ([[1.0, 0.0], [1.0, 0.0]], [[0.0, -4.0], [0.0, 4.0]])
    no_column = ([[0.0, 0.0], [0.0, 0.0]], [[-4.0, -4.0], [4.0, 4.0]])
    experts = ExpertWeights(list(weights), list(weights), list(weights), silu)
    # Gate and up read the layer's input, down what is between.
    for norms, gate_and_up, down in (
        ([(uneven, even), (even, even)], first_column, no_column),
        ([(even, uneven), (even, even)], no_column, first_column),
    ):
        expected = (gate_and_up, gate_and_up, down)
        for (words, _), members in zip(merge_by_the_paper(experts, norms), expected, strict=True):
            assert tuple(unpack(words, member).tolist() for member in (0, 1)) == members


def test_at_tau_04_half_of_two_gaussian_experts_is_shared() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = ((400, 300), (400, 300), (300, 400))
    gate, up, down = ([torch.randn(*size, generator=generator) * 0.02 for _ in range(2)] for size in sizes)
    experts = ExpertWeights(gate, up, down, silu)
    statistics = merge_layer(experts, slots_of([(0, 1)], 2), Recipe(rules.PAPER)).statistics
    assert statistics.elements == 3 * 400 * 300
    # The paper counts about 48 % similar elements, so about 26 % of an expert's weights lost.
    assert statistics.shared_fraction == pytest.approx(0.48, abs=0.03)
    assert statistics.kept_fraction == pytest.approx(0.74, abs=0.02)


@pytest.mark.parametrize("tau", [None, 0.4])
def test_a_large_matrix_is_merged_as_if_all_of_it_were_there_at_once(tau: float | None) -> None:
    """Of more elements than are merged at once, in numbers of rows that do not divide."""
    experts = small_experts(2, hidden_size=700, intermediate_size=401)
    generator = torch.Generator().manual_seed(1)
    hidden, intermediate = (torch.rand(2, 1, size, generator=generator) for size in (700, 401))
    merged = ElementRule(((None, hidden), (None, hidden), (None, intermediate)), tau).merge(experts, (0, 1))
    for got, own, importance in (
        (merged.gate, experts.gate, hidden),
        (merged.up, experts.up, hidden),
        (merged.down, experts.down, intermediate),
    ):
        weights = torch.stack(own).float()
        magnitudes = weights.abs()
        whole = cheapest(magnitudes, importance) if tau is None else paper_rule(magnitudes, importance, tau)
        assert torch.equal(torch.stack(got), whole.signed(weights))


def test_by_saliency_every_weight_counts_what_its_neuron_says() -> None:
    experts, routed = small_experts(), small_tokens(60)
    pair = (4, 1)
    statistics = [measure_saliency(experts, expert, routed, full=False) for expert in pair]
    merged = ElementRule.of_saliency(statistics).merge(experts, pair)
    costs = torch.stack([member.neuron_costs() for member in statistics]).chunk(3, dim=2)
    down = [matrix.T for matrix in merged.down], [matrix.T for matrix in experts.down]
    for got, own, each in zip(
        (merged.gate, merged.up, down[0]), (experts.gate, experts.up, down[1]), costs, strict=True
    ):
        weights = torch.stack([own[expert].float() for expert in pair])
        torch.testing.assert_close(torch.stack(list(got)), cheapest(weights.abs(), each).signed(weights))


def test_by_compensation_gate_and_up_have_their_own_rows_and_down_reads_what_is_merged() -> None:
    experts, routed = small_experts(), small_tokens(200)
    pair = (4, 1)
    statistics = [measure_saliency(experts, expert, routed, full=True) for expert in pair]
    lacking = torch.zeros_like(routed.hidden)
    merged = merge_by_compensation(experts, pair, statistics, OutputCorrection(experts, routed, lacking))
    hidden = torch.stack([member.hidden for member in statistics])
    for got, own, rows in (
        (merged.gate, experts.gate, [member.gate_rows for member in statistics]),
        (merged.up, experts.up, [member.up_rows for member in statistics]),
    ):
        alone = compensate_columns(torch.stack([own[expert].float() for expert in pair]), hidden, torch.stack(rows))
        # Products of another shape may round to the neighbour.
        torch.testing.assert_close(torch.stack(list(got)), alone, rtol=2**-6, atol=0)
    correction = OutputCorrection(experts, routed, torch.zeros_like(lacking))
    asked = [correction.ask(expert, merged, member, statistics[member]) for member, expert in enumerate(pair)]
    targets, moments = (torch.stack(parts) for parts in zip(*asked, strict=True))
    down = compensate_columns(targets, moments, torch.ones(targets.shape[:2]))
    torch.testing.assert_close(torch.stack(list(merged.down)), down)


@pytest.mark.parametrize("recipe", EVERY_RECIPE, ids=recipe_name)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_an_element_that_cannot_be_stored_names_its_own_tensor(value: float, recipe: Recipe) -> None:
    routed = small_tokens(60)
    # Two mates, whose larger element could hide the other, and one expert alone.
    for expert, position, name in ((1, 0, "1.gate"), (4, 1, "4.up"), (2, 2, "2.down")):
        experts = small_experts()
        matrix = experts.matrices(expert)[position]
        matrix[3, 7] = value
        with pytest.raises(FormatError, match=rf"^{name}\[3, 7\] is"):
            merge_layer(experts, slots_of([(1, 4)]), recipe, routed, torch.zeros_like(routed.hidden))


@pytest.mark.parametrize("recipe", EVERY_RECIPE, ids=recipe_name)
def test_words_hold_what_a_reader_finds_in_slot_order(recipe: Recipe) -> None:
    experts, routed = small_experts(), small_tokens(60)
    slots = slots_of([(4, 1), (0, 5)])
    packed = merge_layer(experts, slots, recipe, routed, torch.zeros_like(routed.hidden))
    assert len(packed.words) == slots.num_slots
    for slot, words in enumerate(packed.words):
        for member, expert in enumerate(slots.members(slot)):
            for matrix, read in zip(words, packed.experts.matrices(expert), strict=True):
                assert torch.equal(unpack(matrix, member), read)
    assert packed.statistics.elements == 2 * 3 * experts.gate[0].numel()
    assert packed.experts.num_experts == NUM_EXPERTS


@pytest.mark.parametrize("rule", ["saliency", "compensated"])
def test_aligned_an_expert_and_its_reordered_copy_lose_nothing(rule: str) -> None:
    experts, routed = small_experts(), small_tokens(60)
    order = torch.randperm(len(experts.gate[0]), generator=torch.Generator().manual_seed(2))
    experts.gate[4], experts.up[4] = experts.gate[1][order], experts.up[1][order]
    experts.down[4] = experts.down[1][:, order]
    hidden = routed.hidden
    before = [experts.output(expert, hidden) for expert in (1, 4)]
    for align in (False, True):
        packed = merge_layer(
            experts.copy(),
            slots_of([(1, 4)]),
            Recipe(rules.RULES[rule], align),
            routed,
            torch.zeros_like(hidden),
        )
        lost = [
            float((packed.experts.output(expert, hidden) - own).norm() / own.norm())
            for expert, own in zip((1, 4), before, strict=True)
        ]
        assert max(lost) < 1e-3 if align else min(lost) > 0.1


@pytest.mark.parametrize("recipe", EVERY_RECIPE, ids=recipe_name)
def test_what_merging_changed_is_counted_on_the_weights_that_were_merged(recipe: Recipe) -> None:
    """Aligned or not: aligned, on those in the order of neurons that was merged."""
    experts, routed = small_experts(), small_tokens(60)
    packed = merge_layer(experts, slots_of([(4, 1)]), recipe, routed, torch.zeros_like(routed.hidden))
    if recipe.align:
        align_mates(
            experts,
            (4, 1),
            [measure_saliency(experts, expert, routed, full=recipe.rule.full_moments) for expert in (4, 1)],
        )
    pairs = [
        (own.double(), read.double())
        for expert in (4, 1)
        for own, read in zip(experts.matrices(expert), packed.experts.matrices(expert), strict=True)
    ]
    error = sum(float((own - read).square().sum()) for own, read in pairs)
    weight = sum(float(own.square().sum()) for own, _ in pairs)
    assert packed.statistics.relative_error == pytest.approx(error / weight)
    kept = sum(int((read != 0).sum()) for _, read in pairs)
    assert packed.statistics.kept == kept
    assert packed.statistics.kept_fraction == pytest.approx(kept / sum(read.numel() for _, read in pairs))
