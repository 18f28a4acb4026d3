"""One call of the experts on a GPU: sort, gate-up, down, combine.

Nothing waits for the device and no shape depends on data, so that a call can be captured in a graph.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from vllm_puzzle.format import WORD16

from .configs import CallSizes, Config, Product, find_config
from .decode import make_decoder
from .elementwise import activate_kernel, combine_kernel
from .products import down_kernel, gate_up_kernel
from .routing import Routing, route
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


@dataclass(frozen=True)
class _Cut:
    """A configuration, and the compile-time sides of the products that follow from it."""

    config: Config
    gate_up: Tile
    down: Tile


@cache
def _find_cut(target: Target, sizes: tuple[int, ...], dtype: tl.dtype) -> _Cut:
    # Made here, where it is remembered, and not in every call.
    config = find_config(target, CallSizes(*sizes))
    return _Cut(config, *make_tiles(config, target, sizes[2], sizes[3], dtype))


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
    output = torch.empty_like(x)
    if num_tokens == 0:
        return output
    if target is None:
        target = current_target(x.device)
    dtype = DTYPES[x.dtype]
    if config is None:
        sizes = (slot_of_expert.shape[0], num_slots, hidden_size, intermediate_size, top_k, num_tokens)
        cut = _find_cut(target, sizes, dtype)
    else:
        cut = _Cut(config, *make_tiles(config, target, hidden_size, intermediate_size, dtype))
    x, topk_ids, topk_weights = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    routing = route(topk_ids, slot_of_expert, num_slots, cut.config.members, cut.config.block_tokens)
    inner = _multiply_gate_up(x, w13, topk_weights, routing, cut, activation, apply_router_weight_on_input)
    results = _multiply_down(inner, w2, routing, cut)
    combine_kernel[(num_tokens, triton.cdiv(hidden_size, _BLOCK))](
        results,
        topk_weights,
        topk_ids,
        slot_of_expert,
        output,
        topk_ids.numel(),
        TOP_K=top_k,
        ROWS=hidden_size,
        SPLIT_K=cut.down.split_k,
        WEIGHT_ON_INPUT=apply_router_weight_on_input,
        BLOCK=_BLOCK,
    )
    return output


def _multiply_gate_up(
    x: torch.Tensor,
    w13: torch.Tensor,
    topk_weights: torch.Tensor,
    routing: Routing,
    cut: _Cut,
    activation: str,
    weight_on_input: bool,
) -> torch.Tensor:
    """The inner activations, (num_choices, intermediate_size), in the order of `routing.choices`."""
    tile = cut.gate_up
    num_choices, intermediate_size = topk_weights.numel(), w13.shape[1] // 2
    inner = x.new_empty(num_choices, intermediate_size)
    split = tile.split_k > 1
    sums = x.new_empty(tile.split_k, num_choices, 2, intermediate_size, dtype=torch.float32) if split else inner
    gate_up_kernel[(triton.cdiv(intermediate_size, tile.block_rows // 2) * routing.num_blocks, tile.split_k)](
        x,
        w13,
        sums,
        topk_weights,
        routing.choices,
        routing.blocks,
        routing.num_blocks,
        num_choices,
        topk_weights.shape[1],
        TILE=tile,
        ACTIVATION=activation,
        WEIGHT_ON_INPUT=weight_on_input,
        num_warps=cut.config.gate_up.num_warps,
    )
    if split:
        activate_kernel[(num_choices, triton.cdiv(intermediate_size, _BLOCK))](
            sums,
            inner,
            num_choices,
            ROWS=intermediate_size,
            SPLIT_K=tile.split_k,
            ACTIVATION=activation,
            BLOCK=_BLOCK,
        )
    return inner


def _multiply_down(inner: torch.Tensor, w2: torch.Tensor, routing: Routing, cut: _Cut) -> torch.Tensor:
    """(split_k, num_choices, hidden_size) in the order of the choices; in float32 where the sum is split."""
    tile = cut.down
    num_choices, hidden_size = len(inner), w2.shape[1]
    dtype = torch.float32 if tile.split_k > 1 else inner.dtype
    results = inner.new_empty(tile.split_k, num_choices, hidden_size, dtype=dtype)
    down_kernel[(triton.cdiv(hidden_size, tile.block_rows) * routing.num_blocks, tile.split_k)](
        inner,
        w2,
        results,
        routing.choices,
        routing.blocks,
        routing.num_blocks,
        num_choices,
        TILE=tile,
        num_warps=cut.config.down.num_warps,
    )
    return results


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
