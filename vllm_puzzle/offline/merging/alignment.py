"""What two experts lose as mates, and which of its mate's intermediate neurons each neuron is merged with.

Reordering an expert's neurons, rows of gate and up together with columns of down, changes no function.
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment

from .elements import cheapest_loss
from .layer import ExpertWeights
from .saliency import ExpertStatistics

# Bounds the temporaries of the loss of every neuron with every other, in elements.
_ELEMENTS_AT_ONCE = 1 << 21
_COLUMNS_AT_ONCE = 512


def neuron_magnitudes(experts: ExpertWeights, expert: int, neurons: slice = slice(None)) -> torch.Tensor:
    """Each neuron's row of gate, of up and column of down, absolute: float32 (num_neurons, 3 * hidden_size)."""
    gate, up, down = experts.matrices(expert)
    return torch.cat([gate[neurons], up[neurons], down[:, neurons].T], dim=1).float().abs()


def estimate_loss(experts: ExpertWeights, pair: tuple[int, int], statistics: Sequence[ExpertStatistics]) -> float:
    """What merging two experts without alignment costs, in units of the layer's squared output summed over tokens.

    Every element counts alone: no other makes up for its error.
    """
    num_neurons, hidden_size = experts.gate[pair[0]].shape
    step = max(1, _ELEMENTS_AT_ONCE // (3 * hidden_size))
    total = 0.0
    for start in range(0, num_neurons, step):
        neurons = slice(start, start + step)
        magnitudes = (neuron_magnitudes(experts, expert, neurons) for expert in pair)
        costs = (member.neuron_costs(neurons) for member in statistics)
        # Row by row, so that the sum does not depend on how many threads there are.
        total += float(cheapest_loss(*magnitudes, *costs).sum(dim=1, dtype=torch.float64).sum())
    return total


def align_neurons(
    magnitudes: tuple[torch.Tensor, torch.Tensor], statistics: Sequence[ExpertStatistics]
) -> torch.Tensor:
    """The order of the second expert's neurons in which the two merge with least loss, by optimal assignment.

    Args:
        magnitudes: of both experts, see `neuron_magnitudes`.
        statistics: of both experts; only the diagonal of moments between inputs is read.

    Returns:
        int64 (intermediate_size,): neuron p of the first goes with neuron `order[p]` of the second.
    """
    first, second = magnitudes
    costs = [member.neuron_costs() for member in statistics]
    neurons, columns = first.shape
    loss = torch.zeros(neurons, neurons, device=first.device)
    step = max(1, _ELEMENTS_AT_ONCE // (neurons * _COLUMNS_AT_ONCE))
    for start in range(0, columns, _COLUMNS_AT_ONCE):
        column = slice(start, start + _COLUMNS_AT_ONCE)
        mates, mates_costs = second[None, :, column], costs[1][None, :, column]
        for row in range(0, neurons, step):
            part = slice(row, row + step)
            loss[part] += cheapest_loss(
                first[part, None, column], mates, costs[0][part, None, column], mates_costs
            ).sum(dim=2)
    return torch.from_numpy(linear_sum_assignment(loss.cpu().numpy())[1]).to(loss.device)
