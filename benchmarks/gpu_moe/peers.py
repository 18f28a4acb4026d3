"""What a packed layer is timed beside: the same experts in other formats, and the bytes that each must read."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm_puzzle.format import unpack
from vllm_puzzle.tuning.layer import PackedLayer
from vllm_puzzle.tuning.shape import LayerShape

FP8_BLOCK = 128


class Engine(NamedTuple):
    """One layer's experts in one format; `run` takes x, topk_weights and topk_ids."""

    name: str
    bytes_per_weight: int
    # Whether both experts of a pair are read at once.
    per_slot: bool
    # The relative difference from the reference engine that the format's own rounding explains.
    tolerance: float
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def plain_experts(layer: PackedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """w13 and w2 of all experts, (num_experts, rows, columns), bfloat16."""
    w13, w2 = (torch.stack([unpack(slot, k) for slot in words for k in range(2)]) for words in (layer.w13, layer.w2))
    return w13, w2


def fp8_blocks(weights: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in FP8, and their scales (num_experts, rows / FP8_BLOCK, columns / FP8_BLOCK), float32."""
    rounded, scales = torch.empty_like(weights, dtype=dtype), []
    for weight, result in zip(weights, rounded, strict=True):
        blocks = weight.float().unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
        scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / torch.finfo(dtype).max
        result.copy_((blocks / scale).view(weight.shape))
        scales.append(scale[:, 0, :, 0])
    return rounded, torch.stack(scales)


def bytes_moved(shape: LayerShape, ids: torch.Tensor, bytes_per_weight: int, per_slot: bool) -> int:
    """The least that must pass through the card's memory: weights that `ids` name, inputs, outputs."""
    units = (ids // 2 if per_slot else ids).unique().numel()
    return units * shape.expert_elements * bytes_per_weight + 2 * 2 * ids.shape[0] * shape.hidden_size
