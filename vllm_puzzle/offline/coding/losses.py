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
_TINY = torch.finfo(torch.float32).tiny


def estimate_coding_losses(
    experts: ExpertWeights, expert: int, statistics: ExpertStatistics, tokens: LayerTokens | None
) -> dict[int, float]:
    """The squared error that coding an expert adds to the layer's output, relative to the squared residual stream.

    By width, of codes of universal points in a sample of rows, with what an error costs once later columns make up for
    it, where the statistics have moments between inputs. Without tokens every weight's error counts alike, and they are
    relative to nothing.
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
    step = max(1, weights.shape[1] // _ROWS)
    share = weights.shape[1] / len(range(0, weights.shape[1], step))
    weights, costs = weights[:, ::step].contiguous(), costs[:, ::step]
    scales = ((weights.square() @ column_costs) / column_costs.sum().clamp(min=_TINY)).sqrt()
    losses = {}
    for bits in CODE_BITS:
        table = Table.of(universal_points(bits, weights.device), scales, costs)
        errors = table.decoded(nearest_codes(weights, table)) - weights
        losses[bits] = share * float(((errors.square() @ column_costs) * costs).sum())
    return losses


def _column_costs(moments: torch.Tensor) -> torch.Tensor:
    """What a unit of squared error in each column costs, float32 (columns,)."""
    if moments.ndim == 1:
        return moments
    full = Moments.of(moments)
    costs = torch.empty_like(full.costs)
    costs[full.order] = full.costs * moments.diagonal().mean()
    return costs
