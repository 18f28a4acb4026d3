"""How much each element of each expert matters: second moments of what its matrices read, and what their rows lead to.

Every token counts with the square of `w`, its router weight, so that an error in an expert's output counts as much as
it moves the layer's.
"""

from dataclasses import dataclass

import torch

from .layer import Activation, ExpertWeights, RoutedTokens, computing_dtype, split_tokens

# Tokens of the whole layer, which are used where an expert's own are few.
_SHARED_TOKENS = 1024
# For the slope of the activation, by central differences in float32.
_STEP = 1e-2


InputNorms = tuple[torch.Tensor, torch.Tensor]
"""L2 norms, float32, of each input channel of gate and up (hidden_size,) and of down (intermediate_size,)."""


def input_norms(experts: ExpertWeights, expert: int, routed: RoutedTokens | None) -> InputNorms:
    """The norms over the tokens routed to an expert, each counting alike, as in PuzzleMoE (section 3) and Wanda.

    Without tokens they are ones: the paper's rule then keeps the larger weight.
    """
    gate = experts.gate[expert]
    if routed is None:
        return torch.ones(gate.shape[1], device=gate.device), torch.ones(gate.shape[0], device=gate.device)
    hidden, intermediate = (torch.zeros(size, dtype=torch.float64, device=gate.device) for size in gate.shape[::-1])
    for _, _, rows in routed.parts(expert):
        hidden += rows.float().square().sum(dim=0)
        intermediate += experts.intermediate(expert, rows).float().square().sum(dim=0)
    return hidden.sqrt().float(), intermediate.sqrt().float()


@dataclass(frozen=True)
class ExpertStatistics:
    """Statistics of one expert, float32: sums over its tokens, so they grow with how often it is used.

    `hidden` is the sum of `w^2 x x^T` over the inputs `x` of gate and up, (hidden_size, hidden_size), or its diagonal
    (hidden_size,); `intermediate` the same of the inputs of down. `gate_rows` and `up_rows` (intermediate_size,) are
    the mean squared change of the expert's output per squared change of one row's output.
    """

    hidden: torch.Tensor
    intermediate: torch.Tensor
    gate_rows: torch.Tensor
    up_rows: torch.Tensor

    def neuron_costs(self, neurons: slice = slice(None)) -> torch.Tensor:
        """What a unit of squared error costs in each weight of each neuron, in units of the layer's squared output.

        Float32 (num_neurons, 3 * hidden_size): the neuron's row of gate, its row of up and its column of down.
        """
        hidden = self.hidden.diagonal() if self.hidden.ndim == 2 else self.hidden
        intermediate = self.intermediate.diagonal() if self.intermediate.ndim == 2 else self.intermediate
        rows = torch.stack([self.gate_rows, self.up_rows])[:, neurons]
        gate, up = rows[..., None] * hidden
        return torch.cat([gate, up, intermediate[neurons, None].expand_as(gate)], dim=1)

    def permuted(self, neurons: torch.Tensor) -> "ExpertStatistics":
        """The statistics of the expert with its neurons in the order `neurons`, int64 (intermediate_size,)."""
        intermediate = self.intermediate[neurons]
        if intermediate.ndim == 2:
            intermediate = intermediate[:, neurons]
        return ExpertStatistics(self.hidden, intermediate, self.gate_rows[neurons], self.up_rows[neurons])


class _Sums:
    """What `ExpertStatistics` is made of, before it is divided."""

    def __init__(self, experts: ExpertWeights, expert: int, full: bool) -> None:
        self._gate, self._up = experts.gate[expert], experts.up[expert]
        self._down_energy = experts.down[expert].float().square().sum(dim=0)
        self._activation = experts.activation
        self._full = full
        self.weight = 0.0
        intermediate_size, hidden_size = self._gate.shape
        self.hidden, self.intermediate = (
            torch.zeros((size, size) if full else size, device=self._gate.device)
            for size in (hidden_size, intermediate_size)
        )
        self.gate_rows, self.up_rows = torch.zeros(2, intermediate_size, device=self._gate.device)

    def add(self, rows: torch.Tensor, weights: torch.Tensor) -> None:
        """Adds tokens: `rows` (num_tokens, hidden_size) and their router weights, float32 (num_tokens,)."""
        gate, up = rows @ self._gate.to(rows.dtype).T, rows @ self._up.to(rows.dtype).T
        intermediate = self._activation(gate) * up
        w = weights[:, None]
        self.weight += float(weights.square().sum())
        self.hidden += self._moment(rows.float() * w)
        self.intermediate += self._moment(intermediate.float() * w)
        slope = _slope(self._activation, gate.float())
        self.gate_rows += (slope * up.float() * w).square().sum(dim=0)
        self.up_rows += (self._activation(gate).float() * w).square().sum(dim=0)

    def _moment(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.T @ inputs if self._full else inputs.square().sum(dim=0)

    def mean(self) -> list[torch.Tensor]:
        """Means of hidden, intermediate, gate_rows and up_rows, per unit of `weight`."""
        sums = (
            self.hidden,
            self.intermediate,
            self.gate_rows * self._down_energy,
            self.up_rows * self._down_energy,
        )
        return [value / max(self.weight, torch.finfo(torch.float32).tiny) for value in sums]


def _slope(activation: Activation, x: torch.Tensor) -> torch.Tensor:
    return (activation(x + _STEP) - activation(x - _STEP)) / (2 * _STEP)


def measure_saliency(experts: ExpertWeights, expert: int, routed: RoutedTokens | None, full: bool) -> ExpertStatistics:
    """The statistics of one expert, shrunk where its tokens are few.

    With n tokens of its own and d inputs a matrix, a share d / (d + n) of the moment's shape is that of the layer's
    tokens, whichever expert they went to; an expert without any counts as if it had seen one of them. Moments between
    inputs are then shrunk to the diagonal by d / (d + n) of all the layer's tokens.

    Args:
        routed: the calibration tokens; None gives `uniform_statistics`.
        full: moments between inputs too, and not only of each with itself.
    """
    if routed is None:
        return uniform_statistics(experts, expert)
    own, shared = _Sums(experts, expert, full), _Sums(experts, expert, full)
    count = 0
    for _, weights, rows in routed.parts(expert):
        own.add(rows, weights)
        count += len(rows)
    step = max(1, len(routed) // _SHARED_TOKENS)
    for rows in split_tokens(routed.hidden[::step].to(computing_dtype(routed.hidden.device))):
        shared.add(rows, torch.ones(len(rows), device=rows.device))
    total = max(own.weight, float(routed.topk_weights.square().mean()))
    mixed = []
    for mine, everyone in zip(own.mean(), shared.mean(), strict=True):
        share = mine.shape[-1] / (mine.shape[-1] + count)
        mixed.append((1 - share) * mine + share * everyone if count else everyone)
    hidden, intermediate, gate_rows, up_rows = mixed
    if full:
        hidden, intermediate = (_toward_diagonal(moment, len(routed)) for moment in (hidden, intermediate))
    return ExpertStatistics(hidden * total, intermediate * total, gate_rows, up_rows)


def uniform_statistics(experts: ExpertWeights, expert: int) -> ExpertStatistics:
    """The statistics without calibration: every input and every row matters alike."""
    gate = experts.gate[expert]
    intermediate_size, hidden_size = gate.shape
    hidden, intermediate = (torch.ones(size, device=gate.device) for size in (hidden_size, intermediate_size))
    return ExpertStatistics(hidden, intermediate, torch.ones_like(intermediate), torch.ones_like(intermediate))


def _toward_diagonal(moment: torch.Tensor, num_tokens: int) -> torch.Tensor:
    share = len(moment) / (len(moment) + num_tokens)
    return (1 - share) * moment + share * torch.diag(moment.diagonal())
