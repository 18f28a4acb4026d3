"""The operators' contract: one custom op for packed pairs and one for codes, whichever engine computes it."""

from typing import Any

import torch

from .checks import check_coded_loaded, check_loaded
from .engine import Engine
from .reference import REFERENCE
from .registry import ENGINES


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
        x: (num_tokens, hidden_size), of one of the engine's dtypes.
        w13: (num_slots, 2 * intermediate_size, hidden_size), int16 words, gate rows above up rows.
        w2: (num_slots, hidden_size, intermediate_size), int16 words. The engine's `allocate` made room for both, and
            its `prepare` has put them into its order.
        slot_of_expert: (num_global_experts,), int32, `2 * slot + member`, -1 for an expert that is not here.
        topk_weights: (num_tokens, top_k), floating.
        topk_ids: (num_tokens, top_k), int32 or int64, global expert ids or -1. The Triton engine does not check them,
            which would wait for the device.
        activation: one of `vllm_puzzle.format.ACTIVATIONS`, applied to the gate before it multiplies the up projection.
        apply_router_weight_on_input: scale an expert's input by its router weight instead of its output.
        engine: the name of one of ENGINES.

    Returns:
        (num_tokens, hidden_size), the dtype of x.

    Raises:
        ValueError: shapes that do not fit each other, an expert id or a slot that is out of range, weights that were
            not loaded or whose memory was freed, or an activation, a dtype or an engine that is not supported.
        EngineError: this machine cannot use the engine.
    """
    return _find(engine).run(
        x, w13, w2, slot_of_expert, topk_weights, topk_ids, activation, apply_router_weight_on_input
    )


def coded_moe(
    x: torch.Tensor,
    w13_codes: torch.Tensor,
    w13_index: torch.Tensor,
    w13_codebook: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_codes: torch.Tensor,
    w2_index: torch.Tensor,
    w2_codebook: torch.Tensor,
    w2_scale: torch.Tensor,
    expert_map: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    apply_router_weight_on_input: bool = False,
    engine: str = REFERENCE,
) -> torch.Tensor:
    """The routed experts of one MoE layer, computed from codes.

    What `packed_moe` says of choices that are skipped, of NaN and infinity, and of its inputs holds here too. A row's
    scale multiplies the float32 sum of its products with the points' coordinates.

    Args:
        x: (num_tokens, hidden_size), of one of the engine's dtypes.
        w13_codes: uint8 (num_bytes,). These four are the tensors of `CodedMatrices`, of gate and up: the engine's
            `allocate_codes` made room for them, and its `prepare_codes` has put them into its order.
        w13_index: int64 (num_experts, 2).
        w13_codebook: bfloat16 (num_experts, 256, 2).
        w13_scale: bfloat16 (num_experts, 2, intermediate_size).
        w2_codes: and the next three, of down; `w2_scale` is (num_experts, 2, ceil(hidden_size / 2)).
        expert_map: (num_global_experts,), int32, the expert's place in these tensors, -1 for one that is not here.
        topk_weights: (num_tokens, top_k), floating.
        topk_ids: (num_tokens, top_k), int32 or int64, global expert ids or -1.
        activation: as for `packed_moe`; so are the next two.

    Returns:
        (num_tokens, hidden_size), the dtype of x.

    Raises:
        ValueError: as `packed_moe` does; an index that sends an expert outside of the codes.
        EngineError: this machine cannot use the engine, or the engine does not read codes.
    """
    return _find(engine).run_coded(
        x,
        w13_codes,
        w13_index,
        w13_codebook,
        w13_scale,
        w2_codes,
        w2_index,
        w2_codebook,
        w2_scale,
        expert_map,
        topk_weights,
        topk_ids,
        activation,
        apply_router_weight_on_input,
    )


def _find(engine: str) -> Engine:
    found = ENGINES.get(engine)
    if found is None:
        raise ValueError(f"engine {engine!r} is not one of {list(ENGINES)}")
    return found


def _fake(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, slot_of_expert: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    # PyTorch comes here with real activations too where a weight is on the meta device, and takes what it gets for a
    # result.
    if any(tensor.device != x.device for tensor in (w13, w2, slot_of_expert)):
        check_loaded(x, w13, w2, slot_of_expert)
    return x.new_empty(x.shape)


def _fake_coded(x: torch.Tensor, *others: Any, **__: Any) -> torch.Tensor:
    staying = others[:9]
    if any(tensor.device != x.device for tensor in staying):
        check_coded_loaded(x, *staying)
    return x.new_empty(x.shape)


# Not torch.library.custom_op: its wrappers are Python that runs on every call, and cost 2 % of a decode step's experts.
_LIBRARY = torch.library.Library("vllm_puzzle", "DEF")
for _operator, _its_fake in ((packed_moe, _fake), (coded_moe, _fake_coded)):
    _LIBRARY.define(_operator.__name__ + torch.library.infer_schema(_operator, mutates_args=()))
    _LIBRARY.impl(_operator.__name__, _operator, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vllm_puzzle::{_operator.__name__}", _its_fake, lib=_LIBRARY)
