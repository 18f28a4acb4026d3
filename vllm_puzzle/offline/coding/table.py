"""What the codes of a row stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Table:
    """The values of every code in every row, and what tells the nearest of them.

    Attributes:
        values: float32 (2, rows, num_points), points times scales.
        slopes: `values` times what an error costs in their row, which is relative to the other half's.
        offsets: float32 (rows, num_points), half of what each code costs where zeros are wanted.
    """

    values: torch.Tensor
    slopes: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, points: torch.Tensor, scales: torch.Tensor, costs: torch.Tensor) -> Table:
        """Of points (num_points, 2), scales (2, rows), and what a unit of squared error costs in each row (2, rows)."""
        shares = costs / costs.sum(dim=0).clamp(min=_TINY)
        values = (scales[..., None] * points.T[:, None]).contiguous()
        slopes = (shares[..., None] * values).contiguous()
        first, second = slopes * values
        return cls(values, slopes, (first + second) / 2)

    def decoded(self, codes: torch.Tensor) -> torch.Tensor:
        """The values of codes, uint8 (rows, columns): float32 (2, rows, columns)."""
        return self.values.gather(2, codes.long().expand(2, -1, -1))
