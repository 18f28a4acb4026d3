"""What each element of an expert matters, compared with the definitions in float64."""

import pytest
import torch
from torch.func import jacrev, vmap

from tests.offline.small import (
    EVERY_RECIPE,
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    NUM_EXPERTS,
    TOP_K,
    merge_layer,
    recipe_name,
    slots_of,
    small_experts,
    small_tokens,
)
from vllm_puzzle.offline.conversion.pairing import list_candidates, match_pairs
from vllm_puzzle.offline.merging.layer import ExpertWeights, LayerTokens, RoutedTokens
from vllm_puzzle.offline.merging.pair_loss import estimate_pairs
from vllm_puzzle.offline.merging.recipe import Recipe
from vllm_puzzle.offline.merging.saliency import input_norms, measure_saliency

FIELDS = ("hidden", "intermediate", "gate_rows", "up_rows")


def defined(experts: ExpertWeights, expert: int, rows: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Second moments and squared slopes of the output, token by token, means over squared router weights."""
    gate, up, down = (matrix.double() for matrix in experts.matrices(expert))
    x, w = rows.double(), weights.double()
    g, u = x @ gate.T, x @ up.T

    def output(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return down @ (experts.activation(g) * u)

    slopes = vmap(jacrev(output, argnums=(0, 1)))(g, u)
    squares = [slope.square().sum(dim=1) for slope in slopes]
    read = experts.activation(g) * u
    total = w.square().sum()
    return {
        "hidden": torch.einsum("t,ti,tj->ij", w.square(), x, x) / total,
        "intermediate": torch.einsum("t,ti,tj->ij", w.square(), read, read) / total,
        "gate_rows": (w.square()[:, None] * squares[0]).sum(dim=0) / total,
        "up_rows": (w.square()[:, None] * squares[1]).sum(dim=0) / total,
    }


def own_and_shared(
    experts: ExpertWeights, expert: int, routed: RoutedTokens
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int, float]:
    chosen = routed.topk_ids == expert
    tokens = chosen.any(dim=1)
    weights = (routed.topk_weights * chosen).sum(dim=1)[tokens]
    own = defined(experts, expert, routed.hidden[tokens], weights)
    shared = defined(experts, expert, routed.hidden, torch.ones(len(routed.hidden)))
    return own, shared, int(tokens.sum()), float(weights.double().square().sum())


def test_statistics_are_the_definition_shrunk_as_stated() -> None:
    experts, routed = small_experts(), small_tokens(150)
    for expert in range(NUM_EXPERTS):
        own, shared, count, total = own_and_shared(experts, expert, routed)
        measured = measure_saliency(experts, expert, routed, full=True)
        for name, inputs in zip(FIELDS, (HIDDEN_SIZE, *3 * (INTERMEDIATE_SIZE,)), strict=True):
            share = inputs / (inputs + count)
            expected = (1 - share) * own[name] + share * shared[name]
            if name in ("hidden", "intermediate"):
                off = inputs / (inputs + len(routed))
                expected = total * ((1 - off) * expected + off * torch.diag(expected.diagonal()))
            got = getattr(measured, name).double()
            # Slopes are central differences.
            assert (got - expected).norm() <= (1e-2 if name == "gate_rows" else 1e-4) * expected.norm()


def test_with_very_many_tokens_an_expert_has_its_own_statistics() -> None:
    experts, routed = small_experts(), small_tokens(6000)
    own, shared, count, total = own_and_shared(experts, 2, routed)
    measured = measure_saliency(experts, 2, routed, full=True)
    for name, inputs in zip(FIELDS, (HIDDEN_SIZE, *3 * (INTERMEDIATE_SIZE,)), strict=True):
        got = getattr(measured, name).double() / (total if name in ("hidden", "intermediate") else 1)
        strange = (own[name].norm() + shared[name].norm()) * (inputs / count + inputs / len(routed))
        assert (got - own[name]).norm() <= 1.1 * strange
        assert strange < 0.1 * own[name].norm()


def test_moments_between_inputs_have_the_diagonal_on_their_diagonal() -> None:
    experts, routed = small_experts(), small_tokens(150, idle=[3])
    for expert in range(3):
        full, diagonal = (measure_saliency(experts, expert, routed, full) for full in (True, False))
        assert full.hidden.shape == (HIDDEN_SIZE, HIDDEN_SIZE)
        assert full.intermediate.shape == (INTERMEDIATE_SIZE, INTERMEDIATE_SIZE)
        torch.testing.assert_close(full.hidden.diagonal(), diagonal.hidden)
        torch.testing.assert_close(full.intermediate.diagonal(), diagonal.intermediate)
        torch.testing.assert_close(full.neuron_costs(), diagonal.neuron_costs())


def test_costs_of_a_neuron_are_those_of_its_gate_its_up_and_its_down() -> None:
    experts, routed = small_experts(), small_tokens(150)
    statistics = measure_saliency(experts, 1, routed, full=False)
    gate, up, down = statistics.neuron_costs().split(HIDDEN_SIZE, dim=1)
    for neuron in (0, 7, INTERMEDIATE_SIZE - 1):
        torch.testing.assert_close(gate[neuron], statistics.gate_rows[neuron] * statistics.hidden)
        torch.testing.assert_close(up[neuron], statistics.up_rows[neuron] * statistics.hidden)
        torch.testing.assert_close(down[neuron], statistics.intermediate[neuron].expand(HIDDEN_SIZE))


def test_a_small_error_in_any_matrix_costs_what_the_statistics_say() -> None:
    """Changes one weight, and compares what the layer's squared output changes by."""
    experts, routed = small_experts(), small_tokens(4000)
    expert, neuron, channel, step = 1, 5, 3, 1e-2
    # A row's slope and its input count as if they were independent, as they are where an input has one square.
    routed.hidden[:, channel] = routed.hidden[:, channel].sign() * 0.7
    before = routed.through(experts)
    statistics = measure_saliency(experts, expert, routed, full=False)
    for position, matrices in enumerate((experts.gate, experts.up, experts.down)):
        changed = experts.copy()
        matrix = matrices[expert].float().clone()
        (matrix.T if position == 2 else matrix)[neuron, channel] += step
        (changed.gate, changed.up, changed.down)[position][expert] = matrix
        change = float((routed.through(changed) - before).double().square().sum()) / step**2
        cost = float(statistics.neuron_costs()[neuron, position * HIDDEN_SIZE + channel])
        assert cost == pytest.approx(change, rel=0.05)


@pytest.mark.parametrize("full", [False, True])
def test_an_expert_without_tokens_is_weighed_as_if_it_had_seen_one(full: bool) -> None:
    experts, routed = small_experts(), small_tokens(120, idle=[3])
    assert len(routed.of(3)[0]) == 0
    measured = measure_saliency(experts, 3, routed, full)
    for name in FIELDS:
        value = getattr(measured, name)
        assert bool(value.isfinite().all())
        assert bool(((value.diagonal() if value.ndim == 2 else value) > 0).all())
    shared = defined(experts, 3, routed.hidden, torch.ones(len(routed)))
    expected = shared["hidden"].diagonal() * float(routed.topk_weights.square().mean())
    got = measured.hidden.diagonal() if full else measured.hidden
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("recipe", EVERY_RECIPE, ids=recipe_name)
def test_every_rule_survives_an_expert_without_tokens(recipe: Recipe) -> None:
    experts, routed = small_experts(), small_tokens(120, idle=[3])
    wanted = routed.through(experts)
    lacking = torch.zeros_like(routed.hidden)
    pairs = slots_of([(1, 3), (0, 4)])
    packed = merge_layer(experts, pairs, recipe, routed, lacking)
    assert all(bool(matrix.isfinite().all()) for e in range(NUM_EXPERTS) for matrix in packed.experts.matrices(e))
    # Its mate, which is used, keeps nearly everything.
    assert bool(routed.through(packed.experts).isfinite().all())
    assert float((routed.through(packed.experts) - wanted).norm() / wanted.norm()) < 0.5


@pytest.mark.parametrize("num_tokens", [1, 2, 10])
def test_moments_of_few_tokens_are_positive_definite(num_tokens: int) -> None:
    experts, routed = small_experts(), small_tokens(num_tokens)
    for expert in set(routed.topk_ids.flatten().tolist()):
        measured = measure_saliency(experts, expert, routed, full=True)
        for moment in (measured.hidden, measured.intermediate):
            scale = moment.diagonal().double().rsqrt()
            correlation = scale[:, None] * moment * scale
            # What is shrunk to the diagonal is the least that any direction has.
            least = len(moment) / (len(moment) + num_tokens)
            assert float(torch.linalg.eigvalsh(correlation)[0]) > 0.99 * least


def test_norms_count_every_token_alike() -> None:
    experts, routed = small_experts(), small_tokens(150)
    for expert in range(NUM_EXPERTS):
        rows = routed.hidden[(routed.topk_ids == expert).any(dim=1)].double()
        gate, up, _ = (matrix.double() for matrix in experts.matrices(expert))
        hidden, intermediate = input_norms(experts, expert, routed)
        torch.testing.assert_close(hidden.double(), rows.norm(dim=0), rtol=1e-4, atol=0)
        expected = (experts.activation(rows @ gate.T) * (rows @ up.T)).norm(dim=0)
        torch.testing.assert_close(intermediate.double(), expected, rtol=1e-4, atol=0)


def tokens_at_once(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("vllm_puzzle.offline.merging.layer.TOKENS_AT_ONCE", count)


def test_a_few_tokens_at_once_give_the_same_statistics_and_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, routed = small_experts(), small_tokens(150, idle=[3])
    seen = []

    def activation(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return torch.nn.functional.silu(x)

    experts.activation = activation

    def everything() -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
        values = [routed.through(experts)]
        for expert in range(NUM_EXPERTS):
            values += input_norms(experts, expert, routed)
            values += [getattr(measure_saliency(experts, expert, routed, full=True), name) for name in FIELDS]
        mates = match_pairs(estimate_pairs(experts, list_candidates(NUM_EXPERTS, 1), LayerTokens(routed, 1.0)), "loss")
        return values, [each.experts for each in mates]

    whole, pairs = everything()
    assert max(seen) > 7
    seen.clear()
    tokens_at_once(monkeypatch, 7)
    parts, same_pairs = everything()
    assert max(seen) == 7
    for part, of_all in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, of_all, rtol=1e-5, atol=1e-5 * float(of_all.abs().max()))
    assert same_pairs == pairs


def test_a_few_tokens_at_once_merge_to_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    routed = small_tokens(150)

    def words(recipe: Recipe) -> list[torch.Tensor]:
        experts, lacking = small_experts(), torch.zeros_like(routed.hidden)
        packed = merge_layer(experts, slots_of([(0, 1), (2, 5)]), recipe, routed, lacking)
        return [matrix for slot in packed.words for matrix in slot]

    for recipe in EVERY_RECIPE:
        with monkeypatch.context() as patch:
            whole = words(recipe)
            tokens_at_once(patch, 7)
            parts = words(recipe)
        # Float32 sums in another order may round to the neighbour.
        differ = sum(int((a != b).sum()) for a, b in zip(parts, whole, strict=True))
        assert differ <= 0.01 * sum(matrix.numel() for matrix in whole)


def test_every_token_reaches_all_of_its_experts() -> None:
    routed = small_tokens(50)
    reached = sorted((token, expert) for expert in range(NUM_EXPERTS) for token in routed.of(expert)[0].tolist())
    assert reached == sorted((token, expert) for token in range(50) for expert in routed.topk_ids[token].tolist())
    assert len(reached) == 50 * TOP_K
