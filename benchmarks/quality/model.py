"""A checkpoint in memory whose experts can be exchanged layer by layer."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.activations import ACT2FN

from benchmarks.quality.peers import LoggedTokens, in_float32
from vllm_puzzle.offline.checkpoints.expert_tensors import layer_experts, layer_names
from vllm_puzzle.offline.checkpoints.packed import PackedCheckpoint
from vllm_puzzle.offline.checkpoints.source import SourceCheckpoint
from vllm_puzzle.offline.conversion.calibration import HiddenStates
from vllm_puzzle.offline.merging.layer import ExpertWeights, RoutedTokens


def in_bfloat16(experts: ExpertWeights) -> ExpertWeights:
    """New lists; a matrix that is bfloat16 already is not copied."""
    gate, up, down = (
        [matrix.bfloat16() for matrix in matrices] for matrices in (experts.gate, experts.up, experts.down)
    )
    return ExpertWeights(gate, up, down, experts.activation)


# Of a layer's index and the tokens that enter it, the experts that it computes with.
Visitor = Callable[[int, LoggedTokens], ExpertWeights]

Choices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What a router says of n tokens: logits (n, num_experts), weights (n, top_k) and int64 ids (n, top_k)."""


class _Experts(nn.Module):
    """A layer's experts: the function of the stock module, on weights that can be replaced."""

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__()
        self.weights = weights
        self.visitor: Callable[[RoutedTokens], ExpertWeights] | None = None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        routed = RoutedTokens(hidden_states, top_k_index, top_k_weights.float())
        weights = self.weights if self.visitor is None else self.visitor(routed)
        return routed.through(weights).to(hidden_states.dtype)


class _Router(nn.Module):
    """A router that can be kept from some experts, as if they had never been there, and from choosing at all."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self._router = router
        self.dropped: list[int] = []
        self.last: Choices | None = None
        self.held: Choices | None = None

    def forward(self, hidden_states: torch.Tensor) -> Choices:
        self.last = self._choose(hidden_states) if self.held is None else self.held
        return self.last

    def _choose(self, hidden_states: torch.Tensor) -> Choices:
        logits, weights, ids = self._router(hidden_states)
        if not self.dropped:
            return logits, weights, ids
        logits = logits.float()
        logits[:, self.dropped] = -torch.inf
        # Both variants of the reference model give the chosen experts weights that add up to 1.
        weights, ids = logits.softmax(dim=-1).topk(self._router.top_k, dim=-1)
        return logits, weights / weights.sum(dim=-1, keepdim=True), ids


class QualityModel:
    """The reference model with transformers' own code around experts of ours.

    Weights are those of the checkpoint, experts rounded to bfloat16; sums are in float32, which a processor without
    instructions for bfloat16 computes several times faster, and which adds no rounding to what is compared.
    """

    def __init__(self, path: Path) -> None:
        self.checkpoint = SourceCheckpoint(path)
        self.config = self.checkpoint.config
        self.shape = self.checkpoint.shape
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.causal = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._sources: dict[int, ExpertWeights] = {}
        for layer in self.shape.moe_layers:
            names = [name for names in layer_names(self.shape, layer) for name in names]
            self._sources[layer] = layer_experts(
                self.shape, layer, self.checkpoint.read(names), ACT2FN[self.config.hidden_act], torch.device("cpu")
            )
            block = self.causal.model.layers[layer].mlp
            block.experts, block.gate = _Experts(in_float32(self._sources[layer])), _Router(block.gate)

    def source(self, layer: int) -> ExpertWeights:
        """A layer's uncompressed experts."""
        return self._sources[layer]

    def reset(self) -> None:
        """Back to the uncompressed experts."""
        for layer, experts in self._sources.items():
            self.set_layer(layer, experts)

    def set_layer(self, layer: int, experts: ExpertWeights, dropped: Collection[int] = ()) -> None:
        """Exchanges a layer's experts, which are rounded to bfloat16; the router no longer chooses `dropped`."""
        block = self.causal.model.layers[layer].mlp
        block.experts.weights = in_float32(in_bfloat16(experts))
        block.gate.dropped = sorted(dropped)

    @torch.inference_mode()
    def visit(self, token_ids: torch.Tensor, visitor: Visitor) -> dict[int, float]:
        """Carries tokens, int64 (num_sequences, sequence_length), through the model, all of them layer by layer.

        `visitor` is given what enters the experts of each MoE layer, and gives the experts to go on with.

        Returns:
            `HiddenStates.energy` behind each MoE layer.
        """
        blocks = {layer: self.causal.model.layers[layer].mlp for layer in self.shape.moe_layers}

        def call(layer: int, routed: RoutedTokens) -> ExpertWeights:
            logits = blocks[layer].gate.last[0].float()
            tokens = LoggedTokens(routed.hidden, routed.topk_ids, routed.topk_weights, logits)
            return in_float32(in_bfloat16(visitor(layer, tokens)))

        energies: dict[int, float] = {}

        def weigh(layer: int, _module: nn.Module, _arguments: Any, states: torch.Tensor) -> None:
            energies[layer] = HiddenStates(states).energy()

        hooks = []
        for layer, block in blocks.items():
            block.experts.visitor = partial(call, layer)
            hooks.append(self.causal.model.layers[layer].register_forward_hook(partial(weigh, layer)))
        try:
            self.causal.model(token_ids, use_cache=False)
        finally:
            for block, hook in zip(blocks.values(), hooks, strict=True):
                block.experts.visitor = None
                hook.remove()
        return energies

    @property
    def drops_experts(self) -> bool:
        """Whether the routers are kept from some experts."""
        return any(self.causal.model.layers[layer].mlp.gate.dropped for layer in self.shape.moe_layers)

    def experts(self, layer: int) -> ExpertWeights:
        """A layer's experts as they are now, float32."""
        weights: ExpertWeights = self.causal.model.layers[layer].mlp.experts.weights
        return weights

    @torch.inference_mode()
    def layer_errors(self, logged: Mapping[int, LoggedTokens]) -> dict[int, float]:
        """What the experts of each layer lose as they are now: see `LoggedTokens.relative_output_error`.

        `logged` are the calibration tokens in the uncompressed model.
        """
        return {
            layer: tokens.relative_output_error(self.source(layer), self.experts(layer))
            for layer, tokens in logged.items()
        }

    def output_error(self, logged: Mapping[int, LoggedTokens]) -> float:
        """The mean of `layer_errors` over the layers."""
        errors = self.layer_errors(logged)
        return sum(errors.values()) / len(errors)

    def choices(self) -> list[Choices]:
        """What each MoE layer's router said of the tokens that the model computed last."""
        return [self.causal.model.layers[layer].mlp.gate.last for layer in self.shape.moe_layers]

    def hold_choices(self, choices: Sequence[Choices] | None) -> None:
        """Has every router say `choices` of the next tokens, whatever they are; None lets it choose again."""
        for index, layer in enumerate(self.shape.moe_layers):
            self.causal.model.layers[layer].mlp.gate.held = None if choices is None else choices[index]

    def load_packed(self, path: Path) -> None:
        """Takes the experts of a packed checkpoint, as any reader decodes them."""
        packed = PackedCheckpoint(path)
        tensors: dict[str, torch.Tensor] = {}
        for name in packed.checkpoint.tensors:
            tensors.update(packed.decode(name))
        for layer, source in self._sources.items():
            self.set_layer(layer, layer_experts(self.shape, layer, tensors, source.activation, torch.device("cpu")))
