"""PuzzleMoE's own form with fewer bits: rays of masks and signs, along which mates share a quantized magnitude."""

import random

import torch

from vllm_puzzle.format import default_max_expert_parallel
from vllm_puzzle.offline.conversion.pairing import draw_mates
from vllm_puzzle.offline.merging.layer import ExpertWeights

from .base import CompressedLayer, LoggedTokens, Method
from .columns import Matrices, matrices_of, sample, stored_layer

# Shared by both mates, and held by one of them: with the signs of their members eight rays.
_RAYS = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
_RAY_BITS = 3
_LLOYD_STEPS = 20
_SAMPLE = 1 << 15
_SCALE_BITS = 16


def quantized_rays(bits: int) -> Method:
    """The words of arXiv 2511.04805, `bits` wide for two weights, with fitted magnitudes in place of stored ones.

    Three bits say which of eight rays (both, the first or the second mate, and their signs), the others which magnitude
    along it. Magnitudes are fitted to each pair of mates and matrix by Lloyd's iterations; scales are one a row and
    mate; both mates are compensated as by GPTQ. The mates are the packed format's random ones.
    """

    def method(experts: ExpertWeights, tokens: LoggedTokens, generator: random.Random) -> CompressedLayer:
        num_experts = experts.num_experts
        mates = torch.tensor(draw_mates(num_experts, default_max_expert_parallel(num_experts), generator))
        made, stored = [], []
        for matrices in matrices_of(experts, tokens):
            values = torch.empty_like(matrices.weights)
            values[mates] = matrices.restored(_by_rays(_paired(matrices, mates), 1 << (bits - _RAY_BITS)))
            made.append(values)
            rows, columns = values.shape[1:]
            magnitudes = len(_RAYS) << (bits - _RAY_BITS)
            stored.append(rows * columns * bits / 2 + _SCALE_BITS * (rows + magnitudes / 2))
        return stored_layer(made, stored, experts)

    return method


def _paired(matrices: Matrices, mates: torch.Tensor) -> Matrices:
    """The same with experts as (num_pairs, 2), in the order of columns that they had."""
    own = matrices
    return Matrices(own.weights[mates], own.rows[mates], own.order, own.factor[mates], own.costs[mates])


def _by_rays(matrices: Matrices, num_magnitudes: int) -> torch.Tensor:
    weights, costs = matrices.weights, matrices.costs[..., None, :]
    scale = ((weights.square() * costs).sum(dim=-1) / costs.sum(dim=-1)).sqrt().clamp(min=1e-9).bfloat16().float()
    importance = (matrices.rows * scale.square())[..., None] * costs
    points = _fit(weights / scale[..., None], importance.expand_as(weights), num_magnitudes)

    def decide(column: torch.Tensor, index: int) -> torch.Tensor:
        unit = column / scale
        chosen = _nearest(unit.abs(), importance[..., index], points)
        return torch.copysign(_take(points, chosen), unit) * scale

    return matrices.compensated(decide)


def _fit(values: torch.Tensor, weights: torch.Tensor, num_magnitudes: int) -> torch.Tensor:
    """Points on the rays, float32 (num_pairs, 3 * num_magnitudes, 2), of values (num_pairs, 2, rows, columns)."""
    num_pairs = len(values)
    chosen = sample(values[0, 0].numel(), _SAMPLE)
    values, weights = (each.flatten(2)[..., chosen] for each in (values.abs(), weights))
    weights = weights / weights.mean(dim=(1, 2), keepdim=True)
    start = torch.linspace(0.4, 2.4, num_magnitudes) if num_magnitudes > 1 else torch.tensor([1.2])
    magnitudes = start.repeat(num_pairs, len(_RAYS))
    rays = _RAYS.repeat_interleave(num_magnitudes, dim=0)
    for _ in range(_LLOYD_STEPS):
        points = magnitudes[..., None] * rays
        chosen = _nearest(values, weights, points)
        ray = rays[chosen].movedim(-1, 1)
        along = torch.zeros_like(magnitudes).scatter_add_(1, chosen, (weights * values * ray).sum(dim=1))
        total = torch.zeros_like(magnitudes).scatter_add_(1, chosen, (weights * ray).sum(dim=1))
        magnitudes = torch.where(total > 0, along / total.clamp(min=1e-30), magnitudes)
    return magnitudes[..., None] * rays


def _nearest(values: torch.Tensor, weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The point with the least weighted distance, int64 (num_pairs, n), of values and weights (num_pairs, 2, n)."""
    features = torch.cat([weights, weights * values], dim=1).mT
    table = torch.cat([points.square(), -2 * points], dim=2).mT
    return (features @ table).argmin(dim=-1)


def _take(points: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return points.gather(1, chosen[..., None].expand(-1, -1, 2)).mT
