"""How far converted weights are from their source."""

from dataclasses import dataclass, fields
from typing import Self

import torch


@dataclass
class WeightChanges:
    """Sums over weights that were converted."""

    squared_error: float = 0.0
    squared_weight: float = 0.0

    def add(self, other: Self) -> None:
        """Adds every sum of this kind."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def relative_error(self) -> float:
        """`||W' - W||^2 / ||W||^2`."""
        return self.squared_error / self.squared_weight if self.squared_weight else 0.0


def squared(matrix: torch.Tensor) -> float:
    """The sum of a matrix's squares."""
    # Row by row, so that the sum does not depend on how many threads there are.
    return float(matrix.square().sum(dim=1).sum(dtype=torch.float64))
