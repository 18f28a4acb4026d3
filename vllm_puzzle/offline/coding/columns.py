"""Choosing the codes of a matrix: each weight's nearest point, or column by column so that the output changes least.

`weights` are float32 (2, rows, columns) everywhere, codes uint8 (rows, columns).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..merging.compensation import inverse_factor
from . import compiled, loops
from .table import Table

# Columns between two updates of all the others; wider blocks move less memory and compute more inside.
_BLOCK = 64
# Added to the diagonal of second moments, relative to its mean, as GPTQ does.
_DAMPING = 0.01
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Moments:
    """The inputs' second moments, damped, over columns in the order in which they are decided.

    Attributes:
        order: int64 (columns,), columns in descending order of their moments.
        damped: float32 (columns, columns), the moments in that order, divided by their mean.
        factor: float32 (columns, columns), upper: `factor^T factor` is the inverse of `damped`.
    """

    order: torch.Tensor
    damped: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, moments: torch.Tensor) -> Moments:
        """Of second moments, float32 (columns, columns)."""
        diagonal = moments.diagonal()
        order = diagonal.argsort(descending=True, stable=True)
        damped = moments[order][:, order] / diagonal.mean().clamp(min=_TINY)
        damped.diagonal().add_(_DAMPING)
        return cls(order, damped, inverse_factor(damped).contiguous())

    @property
    def costs(self) -> torch.Tensor:
        """What a unit of squared error in each column costs once the columns after it make up for it, (columns,)."""
        return self.factor.diagonal().square().reciprocal()


def nearest_codes(weights: torch.Tensor, table: Table) -> torch.Tensor:
    """The code of the nearest point for each weight by itself."""
    codes = torch.empty(weights.shape[1:], dtype=torch.uint8, device=weights.device)
    if _is_compiled_for(weights):
        compiled.choose_nearest(weights.contiguous(), table, codes)
    else:
        loops.choose_nearest(weights, table, codes)
    return codes


def compensate(weights: torch.Tensor, table: Table, moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """Decides one column after the other; columns still to come make up for the error of each.

    Args:
        weights: in the order of `moments`.

    Returns:
        Codes, and what each weight was when it was decided, as `weights`.
    """
    compensate_block = compiled.compensate_block if _is_compiled_for(weights) else loops.compensate_block
    wanted = weights.clone()
    codes = torch.empty(weights.shape[1:], dtype=torch.uint8, device=weights.device)
    num_columns = weights.shape[2]
    for start in range(0, num_columns, _BLOCK):
        stop = min(start + _BLOCK, num_columns)
        corner = moments.factor[start:stop, start:stop]
        errors = compensate_block(wanted[:, :, start:stop], table, corner, codes[:, start:stop])
        if stop < num_columns:
            wanted[:, :, stop:] -= errors @ moments.factor[start:stop, stop:]
    return codes, wanted


class Descent:
    """Coordinate descent on the codes of a matrix: each is chosen again, given all others.

    Args:
        codes, weights: in the order of `moments`; `codes` is changed.

    Attributes:
        decoded: what `codes` stand for, float32 (2, rows, columns).
        read: `decoded` times the moments.
    """

    def __init__(self, codes: torch.Tensor, weights: torch.Tensor, table: Table, moments: Moments) -> None:
        self.codes = codes
        self.decoded = table.decoded(codes)
        self.read = self.decoded @ moments.damped
        self._wanted = weights @ moments.damped
        self._moments = moments.damped

    def sweep(self, table: Table) -> None:
        """Goes once through the columns; the error does not grow."""
        descend_block = compiled.descend_block if _is_compiled_for(self.read) else loops.descend_block
        for start in range(0, self.codes.shape[1], _BLOCK):
            block = slice(start, start + _BLOCK)
            pull = self._wanted[:, :, block] - self.read[:, :, block]
            codes = self.codes[:, block].contiguous()
            moved = descend_block(pull, table, self._moments[block, block], codes)
            self.codes[:, block] = codes
            self.read.baddbmm_(moved, self._moments[block].expand(2, -1, -1), alpha=-1)
        self.decoded = table.decoded(self.codes)

    def rescale(self, ratios: torch.Tensor) -> None:
        """Follows a change of the scales, float32 (2, rows), of new ones to old."""
        self.decoded *= ratios[..., None]
        self.read *= ratios[..., None]


def _is_compiled_for(weights: torch.Tensor) -> bool:
    return weights.device.type == "cpu" and compiled.is_compiled()
