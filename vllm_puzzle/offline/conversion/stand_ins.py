"""What takes the place of parts of transformers' model, to record what they are called with."""

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

_IMPLEMENTATION = "vllm_puzzle_calibration"


class LastLayerReachedError(Exception):
    """Ends a run of the model where its last decoder layer would begin: what follows has no weights."""


class Recorder(nn.Module):
    """Replaces a decoder layer, and records what the model calls it with; all else is asked of the layer."""

    def __init__(self, layer: nn.Module, is_last: bool) -> None:
        super().__init__()
        # Not as a part of this module.
        object.__setattr__(self, "_layer", layer)
        self._is_last = is_last
        self.hidden_states = torch.empty(0)
        self.arguments: tuple[Any, ...] = ()
        self.named_arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **named_arguments: Any) -> torch.Tensor:
        self.hidden_states, self.arguments, self.named_arguments = hidden_states, arguments, named_arguments
        if self._is_last:
            raise LastLayerReachedError
        return hidden_states


class RecordedExperts:
    """A layer's routed experts in transformers' own module of it, which then record what enters them.

    They return zeros, or `answer` where that is given: a decoder layer adds its experts' output to everything else, so
    its output is then that without its experts. `calls` are (bfloat16 hidden (num_tokens, hidden_size), expert ids and
    float32 router weights (num_tokens, top_k)) each.
    """

    def __init__(self, experts: nn.Module) -> None:
        """`experts` dispatches through transformers' interface for experts, see `dispatches`."""
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.answer: torch.Tensor | None = None
        # The config is shared by all layers of a model that is never run itself.
        experts.config._experts_implementation = _IMPLEMENTATION  # type: ignore[union-attr]
        experts.recorded = self  # type: ignore[assignment]

    def record(self, hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.calls.append((hidden_states.to(torch.bfloat16), ids, weights.float()))
        return torch.zeros_like(hidden_states) if self.answer is None else self.answer.to(hidden_states)


def dispatches(module: nn.Module) -> bool:
    """Whether a module is routed experts that transformers computes by whatever function its config asks for."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "config")


def _record(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    recorded: RecordedExperts = experts.recorded
    return recorded.record(hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _record)


class WeighedExperts(nn.Module):
    """Replaces experts whose inputs are multiplied by their router weights, where one is chosen for each token.

    They are called with (num_experts * num_tokens, hidden_size): all tokens for each expert in turn, with zeros for the
    tokens that are not routed to it. `calls` are as those of `RecordedExperts`.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._num_experts = num_experts

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        by_expert = hidden_states.unflatten(0, (self._num_experts, -1))
        chosen = by_expert.abs().amax(dim=2).argmax(dim=0)[:, None]
        self.calls.append((by_expert.sum(dim=0).to(torch.bfloat16), chosen, torch.ones_like(chosen).float()))
        return torch.zeros_like(hidden_states)
