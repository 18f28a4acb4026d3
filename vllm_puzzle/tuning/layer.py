"""One layer to measure: random experts in packed pairs, random routing."""

import torch

from vllm_puzzle.format import pack
from vllm_puzzle.kernels import TRITON

from .shape import LayerShape


class PackedLayer:
    """Random experts in packed pairs on `device`: expert e is member e % 2 of slot e // 2."""

    def __init__(self, shape: LayerShape, device: torch.device) -> None:
        self.w13 = random_words(shape.num_slots, 2 * shape.intermediate_size, shape.hidden_size, device)
        self.w2 = random_words(shape.num_slots, shape.hidden_size, shape.intermediate_size, device)
        self.slot_of_expert = torch.arange(shape.num_experts, dtype=torch.int32, device=device)

    def run(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, engine: str = TRITON
    ) -> torch.Tensor:
        """(num_tokens, hidden_size), the dtype of x; see `packed_moe`."""
        return torch.ops.vllm_puzzle.packed_moe(
            x, self.w13, self.w2, self.slot_of_expert, topk_weights, topk_ids, "silu", False, engine
        )


def random_words(num_slots: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """(num_slots, rows, columns), int16: what merging two Gaussian matrices leaves, half shared and half exclusive."""
    words = torch.empty(num_slots, rows, columns, dtype=torch.int16, device=device)
    for slot in words:
        first, second, *signs = (torch.rand(slot.shape, device=device) < share for share in (0.75, 0.5, 0.5, 0.5))
        slot.copy_(pack(torch.randn(slot.shape, device=device).abs() * 0.02, [first, second | ~first], signs))
    return words


def draw(shape: LayerShape, num_tokens: int, routing: str = "random") -> torch.Tensor:
    """(num_tokens, top_k), int32 expert ids: `random`, or both `mates` of each of top_k / 2 slots."""
    if routing == "random":
        return torch.rand(num_tokens, shape.num_experts).topk(shape.top_k).indices.int()
    slots = torch.rand(num_tokens, shape.num_experts // 2).topk(shape.top_k // 2).indices.int()
    return torch.stack([2 * slots, 2 * slots + 1], dim=2).flatten(1)


def relative_difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of `expected`, or over 1 where that is zero."""
    norm = expected.float().norm().item()
    return (output.float() - expected.float()).norm().item() / (norm or 1.0)
