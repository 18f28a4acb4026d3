"""A checkpoint in memory whose experts can be exchanged layer by layer."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.activations import ACT2FN

from vllm_puzzle.format import parse_packed_name, unpack
from vllm_puzzle.offline.checkpoints.expert_tensors import layer_experts, layer_names
from vllm_puzzle.offline.checkpoints.families import find_moe_shape
from vllm_puzzle.offline.checkpoints.packed import PackedCheckpoint
from vllm_puzzle.offline.checkpoints.source import SourceCheckpoint
from vllm_puzzle.offline.merging.layer import ExpertWeights, RoutedTokens


def in_bfloat16(experts: ExpertWeights) -> ExpertWeights:
    """New lists; a matrix that is bfloat16 already is not copied."""
    gate, up, down = (
        [matrix.bfloat16() for matrix in matrices] for matrices in (experts.gate, experts.up, experts.down)
    )
    return ExpertWeights(gate, up, down, experts.activation)


class _Experts(nn.Module):
    """A layer's experts: the function of the stock module, on weights that can be replaced."""

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__()
        self.weights = weights

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        routed = RoutedTokens(hidden_states, top_k_index, top_k_weights.float())
        return routed.through(self.weights).to(hidden_states.dtype)


class _Router(nn.Module):
    """A router that never chooses some experts: its logits for them are -inf, as if they had never been there."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self._router = router
        self.dropped: list[int] = []

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, weights, ids = self._router(hidden_states)
        if not self.dropped:
            return logits, weights, ids
        logits = logits.float()
        logits[:, self.dropped] = -torch.inf
        # Both variants of the reference model give the chosen experts weights that add up to 1.
        weights, ids = logits.softmax(dim=-1).topk(self._router.top_k, dim=-1)
        return logits, weights / weights.sum(dim=-1, keepdim=True), ids


class QualityModel:
    """The reference model with transformers' own code around experts of ours."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = SourceCheckpoint(path)
        self.config = self.checkpoint.config
        self.shape = find_moe_shape(self.config, str(path / "config.json"))
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.causal = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self._sources: dict[int, ExpertWeights] = {}
        for layer in self.shape.moe_layers:
            names = [name for names in layer_names(self.shape, layer) for name in names]
            self._sources[layer] = layer_experts(
                self.shape, layer, self.checkpoint.read(names), ACT2FN[self.config.hidden_act], torch.device("cpu")
            )
            block = self.causal.model.layers[layer].mlp
            block.experts, block.gate = _Experts(self._sources[layer]), _Router(block.gate)

    def source(self, layer: int) -> ExpertWeights:
        """A layer's uncompressed experts."""
        return self._sources[layer]

    def reset(self) -> None:
        """Back to the uncompressed experts."""
        for layer, experts in self._sources.items():
            self.set_layer(layer, experts)

    def set_layer(self, layer: int, experts: ExpertWeights, dropped: Collection[int] = ()) -> None:
        """Exchanges a layer's experts, in bfloat16 from then on; the router no longer chooses `dropped`."""
        block = self.causal.model.layers[layer].mlp
        block.experts.weights = in_bfloat16(experts)
        block.gate.dropped = sorted(dropped)

    def load_packed(self, path: Path) -> None:
        """Takes the experts of a packed checkpoint, as any reader decodes them."""
        packed = PackedCheckpoint(path)
        tensors: dict[str, torch.Tensor] = {}
        for name in packed.checkpoint.tensors:
            members = packed.members(name) if parse_packed_name(name) else None
            if members is None:
                continue
            words = packed.checkpoint.read([name])[name]
            tensors.update({expert: unpack(words, member) for member, expert in enumerate(members)})
        for layer, source in self._sources.items():
            self.set_layer(layer, layer_experts(self.shape, layer, tensors, source.activation, torch.device("cpu")))
