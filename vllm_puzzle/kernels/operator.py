"""The operator's contract: one custom op, whichever engine computes it."""

import torch

from .reference import ACTIVATIONS, reference_moe


@torch.library.custom_op("vllm_puzzle::packed_moe", mutates_args=())
def packed_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    slot_of_expert: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    apply_router_weight_on_input: bool = False,
) -> torch.Tensor:
    """The routed experts of one MoE layer, computed from packed slots.

    A choice whose id is -1, or whose expert is not here, is skipped; an expert without tokens costs nothing; no tokens
    at all is legal. Sums run in float32. Inputs are not written to, and the output aliases none of them.

    Args:
        x: (num_tokens, hidden_size), bfloat16, float16 or float32.
        w13: (num_slots, 2 * intermediate_size, hidden_size), int16 words, gate rows above up rows.
        w2: (num_slots, hidden_size, intermediate_size), int16 words.
        slot_of_expert: (num_global_experts,), int32, `2 * slot + member`, -1 for an expert that is not here.
        topk_weights: (num_tokens, top_k), floating.
        topk_ids: (num_tokens, top_k), int32 or int64, global expert ids or -1.
        activation: one of ACTIVATIONS, applied to the gate before it multiplies the up projection.
        apply_router_weight_on_input: scale an expert's input by its router weight instead of its output.

    Returns:
        (num_tokens, hidden_size), the dtype of x.

    Raises:
        ValueError: shapes that do not fit each other, or an activation that is not supported.
    """
    _check(x, w13, w2, topk_weights, topk_ids, activation)
    return reference_moe(x, w13, w2, slot_of_expert, topk_weights, topk_ids, activation, apply_router_weight_on_input)


@packed_moe.register_fake
def _(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    slot_of_expert: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    apply_router_weight_on_input: bool = False,
) -> torch.Tensor:
    return x.new_empty(x.shape)


def _check(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported; packed_moe knows {sorted(ACTIVATIONS)}")
    num_slots, rows, hidden_size = w13.shape
    if x.shape[1:] != (hidden_size,) or w2.shape != (num_slots, hidden_size, rows // 2) or rows % 2:
        raise ValueError(
            f"shapes do not fit: x {list(x.shape)}, w13 {list(w13.shape)}, w2 {list(w2.shape)}; expected x (M, H), "
            f"w13 (slots, 2 I, H), w2 (slots, H, I)"
        )
    if topk_ids.shape != topk_weights.shape or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"shapes do not fit: topk_ids {list(topk_ids.shape)}, topk_weights {list(topk_weights.shape)}, "
            f"x {list(x.shape)}"
        )
