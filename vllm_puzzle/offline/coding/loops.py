"""The loops over columns, in torch: for other devices than a CPU, and where coding.cpp was not compiled.

`compiled` has the same functions. Weights are float32 (2, rows, columns), codes uint8 (rows, columns); both are changed
in place, and may be blocks of columns of larger tensors.
"""

import torch

from .table import Table


def choose_nearest(weights: torch.Tensor, table: Table, codes: torch.Tensor) -> None:
    """Sets each code to that of the point nearest to its weights."""
    for k, column in enumerate(weights.permute(2, 0, 1).contiguous()):
        codes[:, k] = _nearest(column, table)


def compensate_block(weights: torch.Tensor, table: Table, corner: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Decides one column of a block after the other; those to come make up for each one's error.

    Args:
        weights: becomes what each weight was when it was decided.
        corner: the block's part of `Moments.factor`, float32 (columns, columns).

    Returns:
        The errors divided by the diagonal of `corner`, as `weights`.
    """
    columns = weights.permute(2, 0, 1).contiguous()
    errors = torch.empty_like(columns)
    for k in range(len(columns)):
        codes[:, k] = _nearest(columns[k], table)
        errors[k] = (columns[k] - _column(table, codes, k)) / corner[k, k]
        columns[k + 1 :] -= corner[k, k + 1 :, None, None] * errors[k]
    weights.copy_(columns.permute(1, 2, 0))
    return errors.permute(1, 2, 0).contiguous()


def descend_block(pull: torch.Tensor, table: Table, corner: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Chooses the codes of a block's columns again, one after the other, each given all others.

    Args:
        pull: what an error in each weight adds to the output's, given the errors in all others.
        corner: the block's part of `Moments.damped`, float32 (columns, columns).

    Returns:
        By how much the error of each weight grew, as `pull`.
    """
    columns = pull.permute(2, 0, 1).contiguous()
    moved = torch.empty_like(columns)
    for k in range(len(columns)):
        old = _column(table, codes, k)
        codes[:, k] = _nearest(old + columns[k] / corner[k, k], table)
        moved[k] = old - _column(table, codes, k)
        columns[k + 1 :] += corner[k, k + 1 :, None, None] * moved[k]
    return moved.permute(1, 2, 0).contiguous()


def _nearest(wanted: torch.Tensor, table: Table) -> torch.Tensor:
    """The codes of one column; `wanted` is (2, rows)."""
    scores = table.offsets - table.slopes[0] * wanted[0, :, None] - table.slopes[1] * wanted[1, :, None]
    return scores.argmin(dim=1)


def _column(table: Table, codes: torch.Tensor, k: int) -> torch.Tensor:
    return table.decoded(codes[:, k : k + 1])[..., 0]
