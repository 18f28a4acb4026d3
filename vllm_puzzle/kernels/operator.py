"""The operator's contract: one custom op, whichever engine computes it."""

import torch

from .choice import ENGINES, REFERENCE, cpu_isa
from .cpu import Isa, cpu_moe, padded, unusable
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
    engine: str = REFERENCE,
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
        engine: one of ENGINES. For the CPU engines both sizes of w13 and w2 are rounded up to multiples of 32 with zero
            words, and `vllm_puzzle.kernels.cpu.tile_slots_` has put the words into tile order.

    Returns:
        (num_tokens, hidden_size), the dtype of x.

    Raises:
        ValueError: shapes that do not fit each other, an expert id that is out of range, or an activation, a dtype or
            an engine that is not supported.
    """
    _check(x, w13, w2, slot_of_expert, topk_weights, topk_ids, activation, engine)
    arguments = (x, w13, w2, slot_of_expert, topk_weights, topk_ids, activation, apply_router_weight_on_input)
    isa = cpu_isa(engine)
    return reference_moe(*arguments) if isa is None else cpu_moe(isa, *arguments)


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
    engine: str = REFERENCE,
) -> torch.Tensor:
    return x.new_empty(x.shape)


def _check(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    slot_of_expert: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    engine: str,
) -> None:
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is not one of {list(ENGINES)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported; packed_moe knows {sorted(ACTIVATIONS)}")
    num_slots, rows, columns = w13.shape
    hidden_size = x.shape[1]
    isa = cpu_isa(engine)
    in_tiles = isa is not None
    expected_columns = padded(hidden_size) if in_tiles else hidden_size
    if (
        columns != expected_columns
        or rows % (64 if in_tiles else 2)
        or tuple(w2.shape) != (num_slots, columns, rows // 2)
    ):
        raise ValueError(
            f"shapes do not fit: x {list(x.shape)}, w13 {list(w13.shape)}, w2 {list(w2.shape)}; expected x (M, H), "
            f"w13 (slots, 2 I, H), w2 (slots, H, I){', H and I rounded up to 32' if in_tiles else ''}"
        )
    if topk_ids.shape != topk_weights.shape or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"shapes do not fit: topk_ids {list(topk_ids.shape)}, topk_weights {list(topk_weights.shape)}, "
            f"x {list(x.shape)}"
        )
    if isa is not None:
        _check_memory(isa, x, w13, w2, slot_of_expert, topk_ids)


def _check_memory(
    isa: Isa,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    slot_of_expert: torch.Tensor,
    topk_ids: torch.Tensor,
) -> None:
    """What compiled code takes on trust, since it sees addresses only."""
    if reason := unusable(isa):
        raise ValueError(f"the level {isa.name.lower()} cannot be used: {reason}")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or (
        x.dtype != torch.bfloat16 and isa is not Isa.PORTABLE
    ):
        raise ValueError(f"x is {x.dtype}, which the level {isa.name.lower()} does not compute")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids is {topk_ids.dtype}; expected int32 or int64")
    expected = {"w13": (w13, torch.int16), "w2": (w2, torch.int16), "slot_of_expert": (slot_of_expert, torch.int32)}
    for name, (tensor, dtype) in expected.items():
        if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; expected contiguous {dtype} on a CPU")
