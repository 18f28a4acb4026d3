"""The operator's contract: one custom op, whichever engine computes it."""

import torch

from .choice import REFERENCE, TRITON, cpu_isa
from .cpu import cpu_moe, fits_cpu, has_memory, padded
from .reference import ACTIVATIONS, reference_moe


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

    Skipped is skipped, also where the choice's router weight is NaN or infinite; a token of which every choice is
    skipped gets zeros, whatever its x. Otherwise NaN or infinity in a token's x or router weights leaves no finite
    number in its row, since masked weights multiply too, as zeros. In no case is another token's row touched.

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
            words, and `vllm_puzzle.kernels.cpu.tile_slots_` has put the words into tile order. The Triton engine takes
            x in bfloat16 or float16 and does not check ids, which would wait for the device.

    Returns:
        (num_tokens, hidden_size), the dtype of x.

    Raises:
        ValueError: shapes that do not fit each other, an expert id or a slot that is out of range, weights that were
            not loaded or whose memory was freed, or an activation, a dtype or an engine that is not supported.
        EngineError: this machine cannot use the engine.
    """
    if engine == TRITON:
        _check(x, w13, w2, slot_of_expert, topk_weights, topk_ids, activation, False)
        from .triton import fits_triton, triton_moe

        if not fits_triton(x, w13, w2, slot_of_expert, topk_ids):
            raise _misfit(engine, "x in bfloat16 or float16", x, w13, w2, slot_of_expert, topk_ids)
        return triton_moe(x, w13, w2, slot_of_expert, topk_weights, topk_ids, activation, apply_router_weight_on_input)
    isa = cpu_isa(engine)
    if isa is None:
        _check(x, w13, w2, slot_of_expert, topk_weights, topk_ids, activation, False)
        return reference_moe(
            x, w13, w2, slot_of_expert, topk_weights, topk_ids, activation, apply_router_weight_on_input
        )
    # One expression where all is well: see CALL_LAYOUT for what a line of Python costs here.
    if not (activation in ACTIVATIONS and fits_cpu(isa, x, w13, w2, slot_of_expert, topk_weights, topk_ids)):
        _check(x, w13, w2, slot_of_expert, topk_weights, topk_ids, activation, True)
        accepted = "x in bfloat16 (cpu-portable: also float16, float32), everything on the CPU"
        raise _misfit(engine, accepted, x, w13, w2, slot_of_expert, topk_ids)
    return cpu_moe(isa, x, w13, w2, slot_of_expert, topk_weights, topk_ids, activation, apply_router_weight_on_input)


def _fake(
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
    # PyTorch comes here with real activations too where a weight is on the meta device, and takes what it gets for a
    # result.
    if any(tensor.device != x.device for tensor in (w13, w2, slot_of_expert)):
        _check_loaded(x, w13, w2, slot_of_expert)
    return x.new_empty(x.shape)


# Not torch.library.custom_op: its wrappers are Python that runs on every call, and cost 2 % of a decode step's experts.
_LIBRARY = torch.library.Library("vllm_puzzle", "DEF")
_LIBRARY.define("packed_moe" + torch.library.infer_schema(packed_moe, mutates_args=()))
_LIBRARY.impl("packed_moe", packed_moe, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_puzzle::packed_moe", _fake, lib=_LIBRARY)


def _misfit(
    engine: str,
    accepted: str,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    slot_of_expert: torch.Tensor,
    topk_ids: torch.Tensor,
) -> ValueError:
    return ValueError(
        f"types do not fit {engine}: x {_kind(x)}, w13 {_kind(w13)}, w2 {_kind(w2)}, slot_of_expert "
        f"{_kind(slot_of_expert)}, topk_ids {_kind(topk_ids)}; expected contiguous int16 words, an int32 table, int32 "
        f"or int64 ids, {accepted}"
    )


def _kind(tensor: torch.Tensor) -> str:
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    return f"({tensor.dtype}, {tensor.device}{layout})"


def _check_loaded(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, slot_of_expert: torch.Tensor) -> None:
    """Raises ValueError where a tensor that stays from call to call has no memory behind it."""
    for name, tensor in (("w13", w13), ("w2", w2), ("slot_of_expert", slot_of_expert)):
        on_meta = tensor.device.type == "meta" and x.device.type != "meta"
        if on_meta or not (tensor.device.type == "meta" or has_memory(tensor)):
            state = "is on the meta device" if on_meta else "has lost its memory"
            raise ValueError(
                f"the packed experts cannot be computed: {name} {list(tensor.shape)} {state}, so its weights were "
                f"never loaded, or reloading them failed; load them again"
            )


def _check(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    slot_of_expert: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    in_tiles: bool,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported; packed_moe knows {sorted(ACTIVATIONS)}")
    _check_loaded(x, w13, w2, slot_of_expert)
    num_slots, rows, columns = w13.shape
    expected_columns = padded(x.shape[1]) if in_tiles else x.shape[1]
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
