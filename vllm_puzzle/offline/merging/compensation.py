"""Merging column by column: what a column loses is pushed into the columns still to come, for each mate by itself.

As GPTQ (arXiv 2210.17323) and SparseGPT (arXiv 2301.00774) do for one matrix; here two matrices are decided together,
each with the second moments of its own inputs.
"""

import torch

from .elements import cheapest

# Columns between two updates of all that follow; wider blocks move less memory and compute more inside.
_BLOCK = 64
# Added to the diagonal of a second moment, relative to its mean, as in both papers.
_DAMPING = 0.01


def compensate_columns(weights: torch.Tensor, moments: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Merges two matrices so that their outputs change least.

    Minimizes `sum_m rows_m (W'_m - W_m) H_m (W'_m - W_m)^T` greedily: columns in descending order of their moments,
    each decided by `cheapest` with the costs `rows / [H^-1]_kk` of errors that the columns still to come make up for.

    Args:
        weights: float32 (2, num_rows, num_columns).
        moments: `H`, the inputs' second moments, float32 (2, num_columns, num_columns).
        rows: what a unit of squared error in each row's output costs, float32 (2, num_rows).

    Returns:
        Both members' new weights, float32 (2, num_rows, num_columns), of which each pair of elements has one magnitude,
        rounded to bfloat16, or a zero.
    """
    num_columns = weights.shape[2]
    diagonal = moments.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    order = (diagonal / mean).sum(dim=0).argsort(descending=True, stable=True)
    damped = moments[:, order][:, :, order] / mean[..., None]
    damped.diagonal(dim1=1, dim2=2).add_(_DAMPING)
    factor = inverse_factor(damped)
    # One factor per member and column: the moments were divided by their mean.
    costs = rows[..., None] * mean[..., None] / factor.diagonal(dim1=1, dim2=2).square()[:, None]
    remaining = weights[:, :, order]
    merged = torch.empty_like(remaining)
    for start in range(0, num_columns, _BLOCK):
        stop = min(start + _BLOCK, num_columns)
        # Columns first, so that each is contiguous: (block, 2, num_rows).
        block = remaining[:, :, start:stop].permute(2, 0, 1).contiguous()
        block_costs = costs[:, :, start:stop].permute(2, 0, 1).contiguous()
        corner = factor[:, start:stop, start:stop]
        errors = torch.empty_like(block)
        for k in range(stop - start):
            column = block[k][..., None]
            decided = cheapest(column.abs(), block_costs[k][..., None]).signed(column)[..., 0].bfloat16().float()
            errors[k] = (block[k] - decided) / corner[:, k, k, None]
            block[k + 1 :] -= corner[:, k, k + 1 :].T[..., None] * errors[k]
            merged[:, :, start + k] = decided
        if stop < num_columns:
            remaining[:, :, stop:] -= errors.permute(1, 2, 0) @ factor[:, start:stop, stop:]
    result = torch.empty_like(merged)
    result[:, :, order] = merged
    return result


def inverse_factor(damped: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of second moments, float32 (..., columns, columns).

    Its row k, divided by its diagonal element, says how the columns after k make up for an error in column k when those
    before k are settled; the square of that element is `[H^-1]_kk` of what is then left.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
