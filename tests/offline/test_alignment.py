"""Which neurons are merged with which: planted orders are found, and no order changes what an expert computes."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import relu

from tests.offline.small import HIDDEN_SIZE, INTERMEDIATE_SIZE, small_experts, small_tokens
from vllm_puzzle.offline.merging.alignment import align_neurons, estimate_loss, neuron_magnitudes
from vllm_puzzle.offline.merging.elements import cheapest_loss
from vllm_puzzle.offline.merging.layer import ExpertWeights
from vllm_puzzle.offline.merging.pair import align_mates
from vllm_puzzle.offline.merging.saliency import ExpertStatistics, measure_saliency, uniform_statistics

PERMUTATION = torch.randperm(INTERMEDIATE_SIZE, generator=torch.Generator().manual_seed(3))


def with_a_reordered_copy(noise: float = 0.0) -> ExpertWeights:
    """Expert 1 is expert 0 with its neurons in the order of PERMUTATION, some signs flipped, and `noise`."""
    experts = small_experts(2)
    generator = torch.Generator().manual_seed(4)

    def disturbed(matrix: torch.Tensor) -> torch.Tensor:
        sign = torch.randint(0, 2, matrix.shape, generator=generator) * 2 - 1
        return (matrix * sign * (1 + noise * torch.randn(matrix.shape, generator=generator))).bfloat16()

    experts.gate[1] = disturbed(experts.gate[0][PERMUTATION])
    experts.up[1] = disturbed(experts.up[0][PERMUTATION])
    experts.down[1] = disturbed(experts.down[0][:, PERMUTATION])
    return experts


def magnitudes_of(experts: ExpertWeights) -> tuple[torch.Tensor, torch.Tensor]:
    return neuron_magnitudes(experts, 0), neuron_magnitudes(experts, 1)


def statistics_of(experts: ExpertWeights, calibrated: bool) -> list[ExpertStatistics]:
    tokens = small_tokens(300, num_experts=2) if calibrated else None
    return [measure_saliency(experts, expert, tokens, full=False) for expert in (0, 1)]


def loss_in_order(experts: ExpertWeights, statistics: list[ExpertStatistics], order: torch.Tensor) -> float:
    reordered = experts.copy()
    reordered.gate[1], reordered.up[1] = experts.gate[1][order], experts.up[1][order]
    reordered.down[1] = experts.down[1][:, order]
    return estimate_loss(reordered, (0, 1), (statistics[0], statistics[1].permuted(order)))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_planted_order_is_found(noise: float, calibrated: bool) -> None:
    experts = with_a_reordered_copy(noise)
    order = align_neurons(magnitudes_of(experts), statistics_of(experts, calibrated))
    assert torch.equal(PERMUTATION[order], torch.arange(INTERMEDIATE_SIZE))


@pytest.mark.parametrize("telling", ["gate", "up", "down"])
def test_every_matrix_tells_neurons_apart(telling: str) -> None:
    experts = with_a_reordered_copy()
    for name in {"gate", "up", "down"} - {telling}:
        for matrix in getattr(experts, name):
            matrix.fill_(0.25)
    order = align_neurons(magnitudes_of(experts), statistics_of(experts, calibrated=False))
    assert torch.equal(PERMUTATION[order], torch.arange(INTERMEDIATE_SIZE))


@pytest.mark.parametrize("calibrated", [False, True])
def test_no_random_order_loses_less(calibrated: bool) -> None:
    experts = small_experts(2)
    statistics = statistics_of(experts, calibrated)
    order = align_neurons(magnitudes_of(experts), statistics)
    assert sorted(order.tolist()) == list(range(INTERMEDIATE_SIZE))
    best = loss_in_order(experts, statistics, order)
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        drawn = torch.randperm(INTERMEDIATE_SIZE, generator=generator)
        assert best < loss_in_order(experts, statistics, drawn)
    for first in range(INTERMEDIATE_SIZE):
        swapped = order.clone()
        swapped[[0, first]] = order[[first, 0]]
        assert best <= loss_in_order(experts, statistics, swapped) * (1 + 1e-6)


def test_neurons_that_matter_to_one_mate_alone_decide_the_order() -> None:
    """Calibration counts: the order that is best for the weights alone is not that which is best for the outputs."""
    experts = small_experts(2)
    statistics = statistics_of(experts, calibrated=True)
    order = align_neurons(magnitudes_of(experts), statistics)
    blind = align_neurons(magnitudes_of(experts), statistics_of(experts, calibrated=False))
    assert loss_in_order(experts, statistics, order) < loss_in_order(experts, statistics, blind)


def test_a_large_layer_is_aligned_as_if_all_losses_were_there_at_once() -> None:
    """Of more columns, and of more elements, than are computed at once."""
    experts = small_experts(2, hidden_size=200, intermediate_size=90)
    statistics = [uniform_statistics(experts, expert) for expert in (0, 1)]
    first, second = magnitudes_of(experts)
    costs = [member.neuron_costs() for member in statistics]
    loss = torch.stack(
        [
            cheapest_loss(row, second, cost, costs[1]).sum(dim=1, dtype=torch.float64)
            for row, cost in zip(first, costs[0], strict=True)
        ]
    )
    least = float(loss[linear_sum_assignment(loss.numpy())].sum())
    order = align_neurons((first, second), statistics)
    assert sorted(order.tolist()) == list(range(90))
    assert float(loss[torch.arange(90), order].sum()) == pytest.approx(least, rel=1e-6)


def test_aligning_changes_no_expert() -> None:
    """In integers, which float64 adds exactly in any order."""
    generator = torch.Generator().manual_seed(6)

    def integers(*size: int) -> torch.Tensor:
        return torch.randint(-4, 5, size, generator=generator).double()

    shape = (INTERMEDIATE_SIZE, HIDDEN_SIZE)
    experts = ExpertWeights(*([integers(*s) for _ in range(3)] for s in (shape, shape, shape[::-1])), activation=relu)
    hidden = integers(50, HIDDEN_SIZE)
    before = [experts.output(expert, hidden) for expert in range(3)]
    unaligned = experts.copy()
    align_mates(experts, (2, 0), [uniform_statistics(experts, 2), uniform_statistics(experts, 0)])
    for expert in range(3):
        assert torch.equal(experts.output(expert, hidden), before[expert])
    # The second mate's neurons moved, and no other's.
    assert not torch.equal(experts.gate[0], unaligned.gate[0])
    for matrices, same in zip(
        (experts.gate, experts.up, experts.down), (unaligned.gate, unaligned.up, unaligned.down), strict=True
    ):
        assert torch.equal(matrices[1], same[1])
        assert torch.equal(matrices[2], same[2])


@pytest.mark.parametrize("full", [False, True])
def test_statistics_move_with_their_neurons(full: bool) -> None:
    experts, tokens = small_experts(2), small_tokens(200, num_experts=2)
    answered = align_mates(experts, (0, 1), [measure_saliency(experts, expert, tokens, full) for expert in (0, 1)])
    for expert in (0, 1):
        anew = measure_saliency(experts, expert, tokens, full)
        for name in ("hidden", "intermediate", "gate_rows", "up_rows"):
            torch.testing.assert_close(getattr(answered[expert], name), getattr(anew, name))


def test_the_estimate_is_what_merging_without_compensation_costs() -> None:
    """Compared with the errors of all weights, times what each is said to cost, over many magnitudes to share."""
    experts = small_experts(2)
    statistics = statistics_of(experts, calibrated=True)
    magnitudes = torch.stack(magnitudes_of(experts))
    costs = torch.stack([member.neuron_costs() for member in statistics])
    choices = [costs[left_out] * magnitudes[left_out].square() for left_out in (0, 1)]
    for share in torch.linspace(0, 1, 201):
        shared = magnitudes[0].lerp(magnitudes[1], share)
        choices.append((costs * (shared - magnitudes).square()).sum(dim=0))
    best = float(torch.stack(choices).amin(dim=0).sum())
    assert estimate_loss(experts, (0, 1), statistics) == pytest.approx(best, rel=1e-3)
