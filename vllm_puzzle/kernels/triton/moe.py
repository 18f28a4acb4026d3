"""One call of the experts on a GPU: sort, gate-up, down, combine.

Nothing waits for the device and no shape depends on data, so that a call can be captured in a graph.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from vllm_puzzle.format import WORD16

from .configs import CallSizes, Config, Product, find_config
from .decode import make_decoder
from .elementwise import activate_kernel, combine_kernel
from .products import down_kernel, gate_up_kernel
from .routing import route
from .target import Target, current_target
from .tiles import Tile

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_BLOCK = 1024


def make_tiles(
    config: Config, target: Target, hidden_size: int, intermediate_size: int, dtype: tl.dtype
) -> tuple[Tile, Tile]:
    """The compile-time sides of the two products, gate-up and down."""
    decoder = make_decoder(dtype, target.ptx)

    def tile(product: Product, k: int, rows: int) -> Tile:
        return Tile(
            k=k,
            rows=rows,
            members=config.members,
            block_rows=product.block_rows,
            block_tokens=config.block_tokens,
            block_k=product.block_k,
            split_k=product.split_k,
            num_stages=product.num_stages,
            weights_first=config.weights_first,
            decoder=decoder,
        )

    return tile(config.gate_up, hidden_size, intermediate_size), tile(config.down, intermediate_size, hidden_size)


@cache
def _find_tiles(target: Target, sizes: tuple[int, ...], dtype: tl.dtype) -> tuple[Config, Tile, Tile]:
    # Made here, where it is remembered, and not in every call.
    config = find_config(target, CallSizes(*sizes))
    return config, *make_tiles(config, target, sizes[2], sizes[3], dtype)


def triton_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    slot_of_expert: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    apply_router_weight_on_input: bool,
    config: Config | None = None,
    target: Target | None = None,
) -> torch.Tensor:
    """See `packed_moe`; sums run in float32.

    With a split sum each expert's result stays in float32 until a token's choices are added up, otherwise it is rounded
    to the dtype of x before, as vLLM's own experts are. Expert ids are not checked against the table.

    Args:
        config: how the products are cut; by default what `find_config` finds for the device and the shape.
        target: what the kernels are compiled for; by default the device of x.
    """
    num_tokens, hidden_size = x.shape
    num_slots, _, intermediate_size = w2.shape
    top_k = topk_ids.shape[1]
    num_choices = topk_ids.numel()
    output = torch.empty_like(x)
    if num_tokens == 0:
        return output
    if target is None:
        target = current_target(x.device)
    dtype = DTYPES[x.dtype]
    if config is None:
        sizes = (slot_of_expert.shape[0], num_slots, hidden_size, intermediate_size, top_k, num_tokens)
        config, gate_up, down = _find_tiles(target, sizes, dtype)
    else:
        gate_up, down = make_tiles(config, target, hidden_size, intermediate_size, dtype)
    x, topk_ids, topk_weights = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    routing = route(topk_ids, slot_of_expert, num_slots, config.members, config.block_tokens)

    inner = x.new_empty(num_choices, intermediate_size)
    split = gate_up.split_k > 1
    sums = x.new_empty(gate_up.split_k, num_choices, 2, intermediate_size, dtype=torch.float32) if split else inner
    half = gate_up.block_rows // 2
    gate_up_kernel[(triton.cdiv(intermediate_size, half) * routing.num_blocks, gate_up.split_k)](
        x,
        w13,
        sums,
        topk_weights,
        routing.choices,
        routing.blocks,
        routing.num_blocks,
        num_choices,
        top_k,
        TILE=gate_up,
        ACTIVATION=activation,
        WEIGHT_ON_INPUT=apply_router_weight_on_input,
        num_warps=config.gate_up.num_warps,
    )
    if split:
        activate_kernel[(num_choices, triton.cdiv(intermediate_size, _BLOCK))](
            sums,
            inner,
            num_choices,
            ROWS=intermediate_size,
            SPLIT_K=gate_up.split_k,
            ACTIVATION=activation,
            BLOCK=_BLOCK,
        )
    results = x.new_empty(down.split_k, num_choices, hidden_size, dtype=torch.float32 if down.split_k > 1 else x.dtype)
    down_kernel[(triton.cdiv(hidden_size, down.block_rows) * routing.num_blocks, down.split_k)](
        inner,
        w2,
        results,
        routing.choices,
        routing.blocks,
        routing.num_blocks,
        num_choices,
        TILE=down,
        num_warps=config.down.num_warps,
    )
    combine_kernel[(num_tokens, triton.cdiv(hidden_size, _BLOCK))](
        results,
        topk_weights,
        topk_ids,
        slot_of_expert,
        output,
        num_choices,
        TOP_K=top_k,
        ROWS=hidden_size,
        SPLIT_K=down.split_k,
        WEIGHT_ON_INPUT=apply_router_weight_on_input,
        BLOCK=_BLOCK,
    )
    return output


def fits_triton(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    slot_of_expert: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> bool:
    """Whether types and layouts are what the kernels take; shapes are checked elsewhere."""
    return (
        x.dtype in DTYPES
        and w13.dtype == w2.dtype == torch.int16
        and w13.is_contiguous()
        and w2.is_contiguous()
        and slot_of_expert.dtype == torch.int32
        and slot_of_expert.is_contiguous()
        and topk_ids.dtype in (torch.int32, torch.int64)
        # Offsets within one slot are 32-bit.
        and w13[0].numel() < 2**31
        and all(tensor.device == x.device for tensor in (w13, w2, slot_of_expert, topk_ids))
    )


def find_undecodable_slot(words: torch.Tensor, dtype: torch.dtype) -> int | None:
    """The first slot with a magnitude that `dtype` cannot hold; words: (num_slots, rows, columns).

    Where `dtype` holds every word, none is read; otherwise it waits for the device.
    """
    largest = make_decoder(DTYPES[dtype], ptx=False).largest_exponent
    if largest == (1 << WORD16.exponent_bits) - 1:
        return None
    for slot, matrix in enumerate(words):
        if ((matrix & WORD16.magnitude_mask) >> WORD16.mantissa_bits).max() > largest:
            return slot
    return None
