"""One MoE layer as calibration and merging see it: its routed experts, and the tokens that were routed to them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Activation = Callable[[torch.Tensor], torch.Tensor]

# Bounds the temporaries of everything that is computed from tokens, whatever the calibration text's length.
TOKENS_AT_ONCE = 8192


def computing_dtype(device: torch.device) -> torch.dtype:
    """What tokens are computed in: float32 on a CPU, since many have no products of bfloat16, bfloat16 elsewhere."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def split_tokens(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of at most TOKENS_AT_ONCE rows each, of a tensor with one row a token."""
    return rows.split(TOKENS_AT_ONCE)


class Experts(Protocol):
    """A layer's experts, as a function of tokens."""

    @property
    def num_experts(self) -> int: ...

    def output(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """The output of one expert, before its router weight: (num_tokens, hidden_size) to the same shape."""


@dataclass
class ExpertWeights:
    """The matrices of a layer's experts, one floating tensor each.

    `gate` and `up` are (intermediate_size, hidden_size) per expert, `down` is (hidden_size, intermediate_size).
    """

    gate: list[torch.Tensor]
    up: list[torch.Tensor]
    down: list[torch.Tensor]
    activation: Activation

    @classmethod
    def unread(cls, num_experts: int, activation: Activation) -> "ExpertWeights":
        """Experts whose matrices are yet to be `put`."""
        nothing = [torch.empty(0)] * num_experts
        return cls(list(nothing), list(nothing), list(nothing), activation)

    @property
    def num_experts(self) -> int:
        return len(self.gate)

    def put(self, expert: int, matrices: Sequence[torch.Tensor]) -> None:
        """Sets gate, up and down of one expert."""
        self.gate[expert], self.up[expert], self.down[expert] = matrices

    def drop(self, expert: int) -> None:
        """Drops the matrices of one expert, so that their memory can be freed."""
        self.put(expert, [torch.empty(0)] * 3)

    def copy(self) -> "ExpertWeights":
        """New lists of the same tensors, so that replacing one there leaves it here."""
        return ExpertWeights(list(self.gate), list(self.up), list(self.down), self.activation)

    def matrices(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate, up and down of one expert."""
        return self.gate[expert], self.up[expert], self.down[expert]

    def intermediate(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """The input of the down projection: (num_tokens, hidden_size) to (num_tokens, intermediate_size)."""
        gate, up = self.gate[expert].to(hidden.dtype), self.up[expert].to(hidden.dtype)
        return self.activation(hidden @ gate.T) * (hidden @ up.T)

    def output(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """See `Experts`."""
        return self.intermediate(expert, hidden) @ self.down[expert].to(hidden.dtype).T


@dataclass(frozen=True)
class RoutedTokens:
    """What enters a layer's experts, and where the router sends it.

    `hidden` is (num_tokens, hidden_size), kept in bfloat16 and computed with in `computing_dtype`; `topk_ids` int64 and
    `topk_weights` float32 are (num_tokens, top_k).
    """

    hidden: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of one expert: their positions, int64 (n,), ascending, and router weights, float32 (n,)."""
        tokens, choices = torch.where(self.topk_ids == expert)
        return tokens, self.topk_weights[tokens, choices]

    def parts(self, expert: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """`of(expert)` in parts of at most TOKENS_AT_ONCE, each with its rows of `hidden`: positions, weights, rows."""
        for tokens, weights in zip(*map(split_tokens, self.of(expert)), strict=True):
            if len(tokens):
                yield tokens, weights, self.hidden[tokens].to(computing_dtype(tokens.device))

    def through(self, experts: Experts) -> torch.Tensor:
        """The sum of the chosen experts' outputs times their router weights, float32 (num_tokens, hidden_size)."""
        total = torch.zeros(self.hidden.shape, dtype=torch.float32, device=self.hidden.device)
        for expert in range(experts.num_experts):
            for tokens, weights, rows in self.parts(expert):
                total.index_add_(0, tokens, experts.output(expert, rows).float() * weights[:, None])
        return total


@dataclass(frozen=True)
class LayerTokens:
    """What calibration knows of one MoE layer.

    Attributes:
        routed: the tokens that enter the layer's experts; for a sequential rule after the merged layers before it.
        energy: what a squared error of the layer's output, summed over tokens, is compared with; see
            `HiddenStates.energy`.
        lacking: for a sequential rule what the layer's output lacks, float32 (num_tokens, hidden_size); changed in
            place while the layer is merged, see `OutputCorrection`.
        idle_experts: ids of the experts that no token reaches in the source model, ascending.
    """

    routed: RoutedTokens
    energy: float
    lacking: torch.Tensor | None = None
    idle_experts: tuple[int, ...] = ()
