"""Modules that replace parts of transformers' model, to record what they are called with."""

from typing import Any

import torch
from torch import nn


class Recorder(nn.Module):
    """Replaces a decoder layer, and records what the model calls it with."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_states = torch.empty(0)
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.hidden_states, self.arguments = hidden_states, arguments
        return hidden_states


class SilentExperts(nn.Module):
    """Replaces a layer's routed experts: records what enters them, and returns zeros.

    A decoder layer adds its experts' output to everything else, so its output is then that without its experts.
    `calls` are (bfloat16 hidden (num_tokens, hidden_size), expert ids and float32 router weights (num_tokens, top_k))
    each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        self.calls.append((hidden_states.to(torch.bfloat16), top_k_index, top_k_weights.float()))
        return torch.zeros_like(hidden_states)


class SilentWeighedExperts(SilentExperts):
    """Replaces experts whose inputs are multiplied by their router weights, where one is chosen for each token.

    They are called with (num_experts * num_tokens, hidden_size): all tokens for each expert in turn, with zeros for the
    tokens that are not routed to it.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self._num_experts = num_experts

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        by_expert = hidden_states.unflatten(0, (self._num_experts, -1))
        chosen = by_expert.abs().amax(dim=2).argmax(dim=0)[:, None]
        return super().forward(by_expert.sum(dim=0), chosen, torch.ones_like(chosen)).new_zeros(hidden_states.shape)
