"""transformers' own whole model, and what hooks see in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vllm_puzzle.offline.checkpoints.shape import MoEShape


@dataclass
class WholeModel:
    """What transformers' own model did with some tokens: per layer, all sequences one after the other.

    `entering` is what the stock experts modules were given (hidden, ids, router weights), `leaving` the states
    after each decoder layer. The model's weights are `layers`.
    """

    layers: Any
    entering: dict[int, Sequence[torch.Tensor]]
    leaving: list[torch.Tensor]


def moe_block(layer: Any) -> Any:
    """What transformers calls mlp in most families."""
    return next(getattr(layer, name) for name in ("mlp", "block_sparse_moe", "feed_forward") if hasattr(layer, name))


def routed(experts: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """(hidden, ids, router weights) of a call of an experts module.

    Llama 4 gives every expert all tokens, times the router weight of the one that is chosen and zero for the others.
    """
    if len(arguments) == 3:
        return arguments
    weighed = arguments[0].view(experts.num_experts, -1, experts.hidden_size)
    chosen = [[int(expert.any(dim=1).nonzero()[0])] for expert in weighed.unbind(dim=1)]
    return weighed.sum(dim=0), torch.tensor(chosen), torch.ones(len(chosen), 1)


def run_whole_model(path: Path, token_ids: torch.Tensor, shape: MoEShape) -> WholeModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    calls: dict[int, list[tuple[torch.Tensor, ...]]] = {layer: [] for layer in shape.moe_layers}
    leaving: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for layer in shape.moe_layers:
        moe_block(model.model.layers[layer]).experts.register_forward_pre_hook(
            lambda module, args, layer=layer: calls[layer].append(routed(module, args))
        )
    for layer, module in enumerate(model.model.layers):
        module.register_forward_hook(lambda module, args, output, layer=layer: leaving[layer].append(output[0]))
    with torch.inference_mode():
        for row in token_ids:
            model(row[None])
    return WholeModel(
        model.model.layers,
        {layer: [torch.cat(part) for part in zip(*parts, strict=True)] for layer, parts in calls.items()},
        [torch.cat(states) for states in leaving],
    )
