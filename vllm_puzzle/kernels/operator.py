"""The operator's contract: one custom op, whichever engine computes it."""

from typing import Any

import torch

from .checks import check_loaded
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
    found = ENGINES.get(engine)
    if found is None:
        raise ValueError(f"engine {engine!r} is not one of {list(ENGINES)}")
    return found.run(x, w13, w2, slot_of_expert, topk_weights, topk_ids, activation, apply_router_weight_on_input)


def _fake(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, slot_of_expert: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    # PyTorch comes here with real activations too where a weight is on the meta device, and takes what it gets for a
    # result.
    if any(tensor.device != x.device for tensor in (w13, w2, slot_of_expert)):
        check_loaded(x, w13, w2, slot_of_expert)
    return x.new_empty(x.shape)


# Not torch.library.custom_op: its wrappers are Python that runs on every call, and cost 2 % of a decode step's experts.
_LIBRARY = torch.library.Library("vllm_puzzle", "DEF")
_LIBRARY.define("packed_moe" + torch.library.infer_schema(packed_moe, mutates_args=()))
_LIBRARY.impl("packed_moe", packed_moe, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_puzzle::packed_moe", _fake, lib=_LIBRARY)
