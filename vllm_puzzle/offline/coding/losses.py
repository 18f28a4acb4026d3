"""What coding an expert is expected to cost at each width, before anything is coded."""

from collections.abc import Mapping

import torch

from vllm_puzzle.format import CODE_BITS, split_rows

from ..merging.layer import ExpertWeights, LayerTokens
from ..merging.saliency import ExpertStatistics
from .columns import Moments, nearest_codes
from .points import universal_points
from .table import Table

# Rows of codes that are looked at, of each matrix.
_ROWS = 64
# What is left by width, as measured on the reference model. With moments between inputs fitted points and descent take
# a tenth, the same in every layer to 2 %; of what the diagonal says compensation takes a third, give or take a tenth.
_LEFT_OF_FULL = {4: 0.93, 5: 0.92, 6: 0.90, 8: 0.85}
_LEFT_OF_DIAGONAL = {4: 0.68, 5: 0.66, 6: 0.64, 8: 0.60}
_TINY = torch.finfo(torch.float32).tiny


def estimate_coding_losses(
    experts: ExpertWeights, expert: int, statistics: ExpertStatistics, tokens: LayerTokens | None
) -> dict[int, float]:
    """The squared error that coding an expert adds to the layer's output, relative to the squared residual stream.

    By width, from codes of universal points in a sample of rows, times what compensation and fitting are known to leave
    of that on real models. Without tokens every weight's error counts alike, and losses are relative to nothing.
    """
    gate, up, down = (matrix.float() for matrix in experts.matrices(expert))
    rows = torch.stack([statistics.gate_rows, statistics.up_rows])
    losses = _matrix_losses(torch.stack([gate, up]), statistics.hidden, rows)
    halves = split_rows(down)
    down_losses = _matrix_losses(halves, statistics.intermediate, torch.ones(halves.shape[:2], device=down.device))
    energy = 1.0 if tokens is None else tokens.energy
    return {bits: (losses[bits] + down_losses[bits]) / energy for bits in CODE_BITS}


def _matrix_losses(weights: torch.Tensor, moments: torch.Tensor, costs: torch.Tensor) -> Mapping[int, float]:
    """Of a matrix (2, rows, columns), by width; see `code_matrix`."""
    column_costs = _column_costs(moments)
    left = _LEFT_OF_DIAGONAL if moments.ndim == 1 else _LEFT_OF_FULL
    step = max(1, weights.shape[1] // _ROWS)
    share = weights.shape[1] / len(range(0, weights.shape[1], step))
    weights, costs = weights[:, ::step].contiguous(), costs[:, ::step]
    scales = ((weights.square() @ column_costs) / column_costs.sum().clamp(min=_TINY)).sqrt()
    losses = {}
    for bits in CODE_BITS:
        table = Table.of(universal_points(bits, weights.device), scales, costs)
        errors = table.decoded(nearest_codes(weights, table)) - weights
        losses[bits] = left[bits] * share * float(((errors.square() @ column_costs) * costs).sum())
    return losses


def _column_costs(moments: torch.Tensor) -> torch.Tensor:
    """What a unit of squared error in each column costs, float32 (columns,)."""
    if moments.ndim == 1:
        return moments
    full = Moments.of(moments)
    costs = torch.empty_like(full.costs)
    costs[full.order] = full.costs * moments.diagonal().mean()
    return costs
