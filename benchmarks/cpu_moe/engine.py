"""What is measured: one layer's experts in one engine's format."""

from abc import ABC, abstractmethod

import torch


class Engine(ABC):
    """One layer's experts in one engine's format."""

    name: str
    # What a weight of an expert that has tokens costs to read; scales are not counted.
    bytes_per_weight: float

    @abstractmethod
    def run(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """The layer's output for x (num_tokens, hidden_size), bfloat16; weights and ids are (num_tokens, top_k)."""

    @abstractmethod
    def copy(self) -> "Engine":
        """The same experts in other memory."""
