"""Levels fitted to the layer: what codes of one weight instead of two give, with everything else alike."""

import math
import random
from collections.abc import Sequence

import torch

from vllm_puzzle.offline.merging.layer import ExpertWeights

from .base import CompressedLayer, LoggedTokens, Method
from .columns import Matrices, matrices_of, sample, stored_layer

_LLOYD_STEPS = 50
_SAMPLE = 1 << 17
_SCALE_STEPS = 2
_SCALE_BITS = 16


def fitted_levels(num_levels: tuple[int, int]) -> Method:
    """GPTQ's compensation with a layer's own levels, one set for gate and up and one for down, and a scale a row.

    Levels are fitted by Lloyd's iterations, weighted by what errors cost, to the weights and again to what compensation
    made of them, scales by alternating least squares; then all columns are decided once more.

    Args:
        num_levels: of gate and up, and of down. Where it is no power of two its logarithm counts as bits.
    """

    def method(experts: ExpertWeights, tokens: LoggedTokens, _: random.Random) -> CompressedLayer:
        made, stored = [], []
        for matrices, count in zip(matrices_of(experts, tokens), num_levels, strict=True):
            made.append(matrices.restored(_by_levels(matrices, count)))
            num_experts, rows, columns = matrices.weights.shape
            stored.append(rows * columns * math.log2(count) + _SCALE_BITS * (rows + count / num_experts))
        return stored_layer(made, stored, experts)

    return method


def _by_levels(matrices: Matrices, count: int) -> torch.Tensor:
    weights, costs = matrices.weights, matrices.costs[..., None, :]
    scale = ((weights.square() * costs).sum(dim=-1) / costs.sum(dim=-1)).sqrt().clamp(min=1e-9)
    # Where levels of many lie for normal weights: as dense as the third root of their density.
    start = 3**0.5 * torch.special.ndtri((torch.arange(count) + 0.5) / count)
    levels = lloyd(start, weights / scale[..., None], _importance(matrices, scale))
    for _ in range(_SCALE_STEPS):
        unit = _nearest(levels, weights / scale[..., None])
        scale = (unit * weights * costs).sum(dim=-1) / (unit.square() * costs).sum(dim=-1).clamp(min=1e-30)
        scale = torch.where(scale > 0, scale, 1e-9).bfloat16().float()
    wanted: list[torch.Tensor] = []

    def decide(column: torch.Tensor, _: int) -> torch.Tensor:
        wanted.append(column / scale)
        return _nearest(levels, wanted[-1]) * scale

    matrices.compensated(decide)
    levels = lloyd(levels, torch.stack(wanted, dim=-1), _importance(matrices, scale))
    return matrices.compensated(decide)


def _importance(matrices: Matrices, scale: torch.Tensor) -> torch.Tensor:
    """What a squared error of a weight in units of its row's scale costs, of the weights' shape."""
    return (matrices.rows * scale.square())[..., None] * matrices.costs[..., None, :]


def lloyd(levels: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Levels, ascending, moved to the weighted means of the values that are nearest to each."""
    chosen = sample(values.numel(), _SAMPLE)
    values, weights = values.flatten()[chosen], weights.flatten()[chosen].double()
    for _ in range(_LLOYD_STEPS):
        nearest = torch.bucketize(values, _middles(levels))
        total = torch.bincount(nearest, weights, len(levels))
        mean = torch.bincount(nearest, weights * values, len(levels)) / total
        levels = torch.where(total > 0, mean, levels.double()).float().sort().values
    return levels


def _middles(levels: Sequence[float] | torch.Tensor) -> torch.Tensor:
    levels = torch.as_tensor(levels)
    return (levels[1:] + levels[:-1]) / 2


def _nearest(levels: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return levels[torch.bucketize(values, _middles(levels))]
