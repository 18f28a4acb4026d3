"""Modules that stand in for parts of transformers' model, to see what comes to them."""

from typing import Any

import torch
from torch import nn


class Recorder(nn.Module):
    """Stands in for a decoder layer and keeps what the model calls it with."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_states = torch.empty(0)
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.hidden_states, self.arguments = hidden_states, arguments
        return hidden_states


class SilentExperts(nn.Module):
    """Stands in for a layer's routed experts: keeps what would enter them and answers zero.

    A decoder layer adds its experts' outputs to everything else, so what comes out is the layer without them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        self.calls.append((hidden_states, top_k_index, top_k_weights.float()))
        return torch.zeros_like(hidden_states)


class SilentWeighedExperts(SilentExperts):
    """The same where router weights go into the experts, one of which is chosen: each weighed input comes out once.

    Such experts are called with all tokens once an expert, one expert after the other, and what an expert does not get
    is zero: (num_experts * num_tokens, hidden_size).
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self._num_experts = num_experts

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        by_expert = hidden_states.unflatten(0, (self._num_experts, -1))
        chosen = by_expert.abs().amax(dim=2).argmax(dim=0)[:, None]
        return super().forward(by_expert.sum(dim=0), chosen, torch.ones_like(chosen)).new_zeros(hidden_states.shape)
