"""What the peers with fewer bits share: a layer's matrices, what their errors cost, and GPTQ's loop over columns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_puzzle.offline.merging.compensation import inverse_factor
from vllm_puzzle.offline.merging.layer import ExpertWeights

from .base import CompressedLayer, LoggedTokens, in_float32

# Columns between two updates of all that follow.
_BLOCK = 64
# Added to the diagonal of a second moment, relative to its mean, as in GPTQ (arXiv 2210.17323).
_DAMPING = 0.01

# The new values of one column, given the wanted ones, (..., rows), and the column's place in the order.
Decide = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Matrices:
    """One kind of matrix of several experts, columns in descending order of their moments.

    The experts' axes come first, whatever their number.

    Attributes:
        weights: float32 (..., rows, columns).
        rows: what a unit of squared error in each row's output costs, float32 (..., rows).
        order: the place of each column in the expert, int64 (columns,).
        factor: the upper Cholesky factor of the damped inverse of the inputs' moments, float32 (..., columns, columns).
        costs: of a squared error in each column that the columns to come make up for, float32 (..., columns).
    """

    weights: torch.Tensor
    rows: torch.Tensor
    order: torch.Tensor
    factor: torch.Tensor
    costs: torch.Tensor

    @classmethod
    def of(cls, weights: torch.Tensor, moments: torch.Tensor, rows: torch.Tensor) -> "Matrices":
        """Of weights in their own order and the inputs' second moments, float32 (..., columns, columns)."""
        diagonal = moments.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.mean(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        order = (diagonal / mean).flatten(0, -2).sum(dim=0).argsort(descending=True, stable=True)
        damped = moments[..., order, :][..., order] / mean[..., None]
        damped.diagonal(dim1=-2, dim2=-1).add_(_DAMPING)
        factor = inverse_factor(damped)
        costs = mean / factor.diagonal(dim1=-2, dim2=-1).square()
        return cls(weights[..., order], rows, order, factor, costs)

    def compensated(self, decide: Decide) -> torch.Tensor:
        """The weights with every column decided, its error pushed into those to come; in this order."""
        num_columns = self.weights.shape[-1]
        remaining, decided = self.weights.clone(), torch.empty_like(self.weights)
        for start in range(0, num_columns, _BLOCK):
            stop = min(start + _BLOCK, num_columns)
            block = remaining[..., start:stop].movedim(-1, 0).contiguous()
            corner = self.factor[..., start:stop, start:stop]
            errors = torch.empty_like(block)
            for k in range(stop - start):
                column = decide(block[k], start + k)
                errors[k] = (block[k] - column) / corner[..., k, k, None]
                block[k + 1 :] -= corner[..., k, k + 1 :].movedim(-1, 0)[..., None] * errors[k]
                decided[..., start + k] = column
            remaining[..., stop:] -= errors.movedim(0, -1) @ self.factor[..., start:stop, stop:]
        return decided

    def rounded(self, decide: Decide) -> torch.Tensor:
        """The weights with every column decided by itself; in this order."""
        return torch.stack([decide(column, k) for k, column in enumerate(self.weights.unbind(dim=-1))], dim=-1)

    def restored(self, values: torch.Tensor) -> torch.Tensor:
        """Values in this order, back in the expert's."""
        result = torch.empty_like(values)
        result[..., self.order] = values
        return result


def matrices_of(experts: ExpertWeights, tokens: LoggedTokens) -> tuple[Matrices, Matrices]:
    """Gate over up, (num_experts, 2 * intermediate_size, hidden_size), and down, (num_experts, hidden_size, ...)."""
    wide = in_float32(experts)
    known = [tokens.statistics(experts, expert) for expert in range(experts.num_experts)]
    w13 = torch.stack([torch.cat([gate, up]) for gate, up in zip(wide.gate, wide.up, strict=True)])
    rows = torch.stack([torch.cat([statistics.gate_rows, statistics.up_rows]) for statistics in known])
    w2 = torch.stack(wide.down)
    return (
        Matrices.of(w13, torch.stack([statistics.hidden for statistics in known]), rows),
        Matrices.of(w2, torch.stack([statistics.intermediate for statistics in known]), torch.ones(w2.shape[:2])),
    )


def experts_of(w13: torch.Tensor, w2: torch.Tensor, like: ExpertWeights) -> ExpertWeights:
    """Experts from what `matrices_of` would give of them, in their own order."""
    gate, up = w13.chunk(2, dim=1)
    return ExpertWeights(list(gate), list(up), list(w2), like.activation)


def stored_layer(made: Sequence[torch.Tensor], num_bits: Sequence[float], like: ExpertWeights) -> CompressedLayer:
    """Experts of what `matrices_of` gave, in their own order, and the bits that one expert's share of each takes."""
    weights = sum(values[0].numel() for values in made)
    return CompressedLayer(experts_of(made[0], made[1], like), bits=sum(num_bits) / weights)


def sample(count: int, most: int) -> torch.Tensor:
    """Which of `count` elements to fit to, where all are more than are needed: int64 (n,), the same every time."""
    if count <= most:
        return torch.arange(count)
    return torch.randint(count, (most,), generator=torch.Generator().manual_seed(0))
