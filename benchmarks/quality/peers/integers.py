"""Integers of few bits with a scale a group of 128 inputs, to nearest or by GPTQ, and a width for each expert."""

import random

import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from benchmarks.quality.round_to_nearest import GROUP_SIZE
from vllm_puzzle.offline.merging.layer import ExpertWeights

from .base import CompressedLayer, LoggedTokens, Method
from .columns import Matrices, experts_of, matrices_of, stored_layer

# A group's range by what it is cut to; the best one counts, as with the option `mse` of GPTQ's authors.
_CLIPS = torch.linspace(1.1, 0.3, 17).tolist()
_SCALE_BITS = 16


class Grid:
    """The integers that one matrix kind's groups round to; of one bit it is the sign that counts.

    Args:
        matrices: what is rounded.
        costs: of a squared error in each column, float32 (..., columns).
    """

    def __init__(self, matrices: Matrices, bits: int, symmetric: bool, costs: torch.Tensor) -> None:
        self._groups = matrices.order // GROUP_SIZE
        self._top = (1 << bits) - 1
        self.stored_bits = bits + self._bits_beside(matrices, _SCALE_BITS + (0 if symmetric else bits))
        num_groups = int(self._groups.max()) + 1
        shape = (*matrices.weights.shape[:-1], num_groups)
        self._scale, self._zero = torch.ones(shape), torch.zeros(shape)
        for group in range(num_groups):
            inside = self._groups == group
            self._fit(group, matrices.weights[..., inside], costs[..., None, inside], symmetric)

    def _bits_beside(self, matrices: Matrices, bits: int) -> float:
        return bits * (int(self._groups.max()) + 1) / matrices.weights.shape[-1]

    def _fit(self, group: int, weights: torch.Tensor, costs: torch.Tensor, symmetric: bool) -> None:
        high, low = weights.amax(dim=-1).clamp(min=0), weights.amin(dim=-1).clamp(max=0)
        best = torch.full(high.shape, torch.inf)
        half = (self._top + 1) // 2
        for clip in _CLIPS:
            span = 2 * torch.maximum(high, -low) if symmetric else high - low
            # In float16, as they are stored.
            scale = (clip * span / self._top).half().float().clamp(min=1e-7)
            middle = (-clip * low / scale).round().clamp(0, self._top)
            if symmetric:
                middle = torch.full_like(scale, half)
            if self._top == 1:
                middle = torch.full_like(scale, 0.5)
            error = ((self._nearest(weights, scale, middle) - weights).square() * costs).sum(dim=-1)
            better = error < best
            best = torch.where(better, error, best)
            self._scale[..., group] = torch.where(better, scale, self._scale[..., group])
            self._zero[..., group] = torch.where(better, middle, self._zero[..., group])

    def _nearest(self, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The nearest values to (..., n) where scale and zero are of (...)."""
        scale, zero = scale[..., None], zero[..., None]
        return ((weights / scale + zero).round().clamp(0, self._top) - zero) * scale

    def decide(self, column: torch.Tensor, index: int) -> torch.Tensor:
        """See `Decide`."""
        group = int(self._groups[index])
        return self._nearest(column[..., None], self._scale[..., group], self._zero[..., group])[..., 0]


def integers(bits: int, symmetric: bool, compensated: bool) -> Method:
    """Rounds to nearest, or `compensated` by GPTQ (arXiv 2210.17323) with the moments of each expert's own tokens.

    Columns go in descending order of their moments, groups and scales stay those of the columns' places, as with
    GPTQ's `act-order` and `static-groups`. Rounding to nearest sees no tokens.
    """

    def method(experts: ExpertWeights, tokens: LoggedTokens, _: random.Random) -> CompressedLayer:
        made, stored = [], []
        for matrices in matrices_of(experts, tokens):
            values, bits_stored = _round(matrices, bits, symmetric, compensated)
            made.append(values)
            stored.append(bits_stored * values[0].numel())
        return stored_layer(made, stored, experts)

    return method


def _round(matrices: Matrices, bits: int, symmetric: bool, compensated: bool) -> tuple[torch.Tensor, float]:
    """The values in the experts' own order, and the bits a weight that they are stored in."""
    grid = Grid(matrices, bits, symmetric, matrices.costs if compensated else torch.ones_like(matrices.costs))
    values = (matrices.compensated if compensated else matrices.rounded)(grid.decide)
    return matrices.restored(values), grid.stored_bits


def mixed_integers(bits: float, widths: tuple[int, ...]) -> Method:
    """MC-MoE, section 3.2 (arXiv 2410.06270): each expert has a width of its own, by an integer program a layer.

    Experts are rounded by GPTQ at each of `widths`. The sum of the errors that they leave in the layer's output, which
    grow with the expert's frequency and its router weights, is least for a mean width of `bits`; as in the paper one
    expert at least has each of the two largest widths.
    """

    def method(experts: ExpertWeights, tokens: LoggedTokens, _: random.Random) -> CompressedLayer:
        kinds = matrices_of(experts, tokens)
        sizes = [matrices.weights[0].numel() for matrices in kinds]
        choices, errors, stored = [], [], []
        for width in widths:
            rounded = [_round(matrices, width, symmetric=False, compensated=True) for matrices in kinds]
            made = experts_of(rounded[0][0], rounded[1][0], experts)
            choices.append(made)
            errors.append(
                [tokens.output_error(experts, expert, made.matrices(expert)) for expert in range(experts.num_experts)]
            )
            stored.append(sum(size * own for size, (_, own) in zip(sizes, rounded, strict=True)) / sum(sizes))
        chosen = _least_error(torch.tensor(errors), widths, bits)
        mixed = experts.copy()
        for expert, choice in enumerate(chosen):
            mixed.put(expert, choices[choice].matrices(expert))
        return CompressedLayer(mixed, bits=sum(stored[choice] for choice in chosen) / len(chosen))

    return method


def _least_error(errors: torch.Tensor, widths: tuple[int, ...], bits: float) -> list[int]:
    """The index of each expert's width, given the errors (num_widths, num_experts)."""
    num_widths, num_experts = errors.shape
    one_each = torch.eye(num_experts).repeat(1, num_widths)
    of_width = torch.eye(num_widths).repeat_interleave(num_experts, dim=1)
    spent = torch.tensor(widths, dtype=torch.float32).repeat_interleave(num_experts)[None]
    result = milp(
        (errors / errors.max().clamp(min=1e-30)).flatten().double().numpy(),
        integrality=1,
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each.numpy(), 1, 1),
            LinearConstraint(spent.numpy(), 0, bits * num_experts),
            LinearConstraint(of_width[-2:].numpy(), 1, num_experts),
        ],
    )
    taken = torch.from_numpy(result.x).view(num_widths, num_experts)
    indices: list[int] = taken.argmax(dim=0).tolist()
    return indices
