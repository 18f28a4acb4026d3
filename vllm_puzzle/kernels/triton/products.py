"""The two grouped products over slots, gate-up and down, each from packed words.

A program takes one block of tokens of one slot (see `routing`) and a tile of weight rows. The words of the tile are
loaded once, through a pipeline of asynchronous loads, and decoded in registers for the member that has tokens, or for
both. Where the hardware multiplies registers on one side only (`wgmma`: its first operand), weights take that side, so
that what is decoded is never written back to shared memory; `mma` gets tokens first, since Triton then spreads the
warps over the weights and no two warps decode the same ones.
"""

import triton
import triton.language as tl

from .activations import activate
from .decode import decode


@triton.jit
def _offsets(rows, TILE: tl.constexpr, ARE_WEIGHTS: tl.constexpr):
    """rows[i] + k, for k below block_k, in the order in which the product takes the operand."""
    k = tl.arange(0, TILE.block_k)
    if ARE_WEIGHTS == TILE.weights_first:
        return rows[:, None] + k[None, :]
    else:
        return k[:, None] + rows[None, :]


@triton.jit
def _load(base, offsets, k, TILE: tl.constexpr, ARE_WEIGHTS: tl.constexpr):
    if TILE.part_k * TILE.split_k == TILE.k:
        return tl.load(base + offsets)
    else:
        inside = k + tl.arange(0, TILE.block_k) < TILE.k
        if ARE_WEIGHTS == TILE.weights_first:
            return tl.load(base + offsets, mask=inside[None, :], other=0)
        else:
            return tl.load(base + offsets, mask=inside[:, None], other=0)


@triton.jit
def _weights(words, MEMBER: tl.constexpr, TILE: tl.constexpr):
    # To Triton 3.6 an attribute of a constexpr is none where it is an argument: it gets a name first.
    DECODER: tl.constexpr = TILE.decoder
    return decode(words, MEMBER, DECODER)


@triton.jit
def _accumulator(TILE: tl.constexpr):
    ROWS: tl.constexpr = TILE.block_rows
    TOKENS: tl.constexpr = TILE.block_tokens
    return tl.zeros((ROWS, TOKENS) if TILE.weights_first else (TOKENS, ROWS), tl.float32)


@triton.jit
def _dot(weights, x, accumulator, TILE: tl.constexpr):
    weights, x = weights.to(TILE.dot_dtype), x.to(TILE.dot_dtype)
    if TILE.weights_first:
        return tl.dot(weights, x, accumulator)
    else:
        return tl.dot(x, weights, accumulator)


@triton.jit
def _finished(accumulator, TILE: tl.constexpr):
    """(block_rows, block_tokens), with the decoder's scale undone."""
    accumulator *= TILE.scale
    if TILE.weights_first:
        return accumulator
    else:
        return tl.trans(accumulator)


@triton.jit
def _multiply_one(w_ptr, x_ptr, w_rows, x_rows, split, TILE: tl.constexpr, MEMBER: tl.constexpr):
    """Main loop for one member.

    w_rows: (block_rows,), offsets of rows of words from w_ptr; x_rows: (block_tokens,), offsets of activations from
    x_ptr; split: which part of k. Returns (block_rows, block_tokens), float32.
    """
    begin = split * TILE.part_k
    # Offsets stay and only w_ptr and x_ptr move: two instructions for the address of a load instead of four.
    w_offsets = _offsets(w_rows + begin, TILE, True)
    x_offsets = _offsets(x_rows + begin, TILE, False)
    accumulator = _accumulator(TILE)
    for k in tl.range(0, TILE.part_k, TILE.block_k, num_stages=TILE.num_stages):
        words = _load(w_ptr, w_offsets, begin + k, TILE, True)
        x = _load(x_ptr, x_offsets, begin + k, TILE, False)
        accumulator = _dot(_weights(words, MEMBER, TILE), x, accumulator, TILE)
        w_ptr += TILE.block_k
        x_ptr += TILE.block_k
    return _finished(accumulator, TILE)


@triton.jit
def _multiply_both(w_ptr, x_ptr, w_rows, x_rows_0, x_rows_1, split, TILE: tl.constexpr):
    """Does what `_multiply_one` does for both members, from one load of the words."""
    begin = split * TILE.part_k
    w_offsets = _offsets(w_rows + begin, TILE, True)
    x_offsets_0 = _offsets(x_rows_0 + begin, TILE, False)
    x_offsets_1 = _offsets(x_rows_1 + begin, TILE, False)
    accumulator_0 = _accumulator(TILE)
    accumulator_1 = _accumulator(TILE)
    for k in tl.range(0, TILE.part_k, TILE.block_k, num_stages=TILE.num_stages):
        words = _load(w_ptr, w_offsets, begin + k, TILE, True)
        weights_0 = _weights(words, 0, TILE)
        weights_1 = _weights(words, 1, TILE)
        x_0 = _load(x_ptr, x_offsets_0, begin + k, TILE, False)
        x_1 = _load(x_ptr, x_offsets_1, begin + k, TILE, False)
        accumulator_0 = _dot(weights_0, x_0, accumulator_0, TILE)
        accumulator_1 = _dot(weights_1, x_1, accumulator_1, TILE)
        w_ptr += TILE.block_k
        x_ptr += TILE.block_k
    return _finished(accumulator_0, TILE), _finished(accumulator_1, TILE)


@triton.jit
def _block(blocks_ptr, num_blocks):
    """This program's tile of rows, its slot (int64), and where each member's tokens begin and how many they are."""
    # Blocks vary fastest, so that blocks of one slot find its words, and all of them the activations, in the L2 cache.
    block = blocks_ptr + tl.program_id(0) % num_blocks
    slot = tl.load(block).to(tl.int64)
    begin_0 = tl.load(block + num_blocks)
    count_0 = tl.load(block + 2 * num_blocks)
    begin_1 = tl.load(block + 3 * num_blocks)
    count_1 = tl.load(block + 4 * num_blocks)
    return tl.program_id(0) // num_blocks, slot, begin_0, count_0, begin_1, count_1


@triton.jit
def _positions(begin, count, TILE: tl.constexpr):
    """The routed positions of a block's tokens, (block_tokens,); those after the last repeat the first."""
    token = tl.arange(0, TILE.block_tokens)
    return begin + tl.where(token < count, token, 0)


@triton.jit
def _gathered_rows(choices_ptr, top_k, begin, count, TILE: tl.constexpr):
    choice = tl.load(choices_ptr + _positions(begin, count, TILE))
    return (choice // top_k).to(tl.int64) * TILE.k


@triton.jit
def _gate_up_rows(tile, TILE: tl.constexpr):
    """Offsets of the packed rows of a tile: eight gate rows, the eight up rows that belong to them, and so on.

    The tensor cores leave rows r and r + 8 of a result in one thread, which thus has a gate and its up.
    """
    row = tl.arange(0, TILE.block_rows)
    gate = tile * (TILE.block_rows // 2) + row // 16 * 8 + row % 8
    if TILE.rows % (TILE.block_rows // 2) != 0:
        gate = tl.minimum(gate, TILE.rows - 1)
    return (gate + row // 8 % 2 * TILE.rows) * TILE.k


@triton.jit
def _store_inner(
    result, begin, count, outputs, TILE: tl.constexpr, ACTIVATION: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr
):
    """result: (block_rows, block_tokens), rows as in `_gate_up_rows`; outputs: what `gate_up_kernel` makes of them."""
    inner_ptr, topk_weights_ptr, choices_ptr, num_choices, tile, split = outputs
    HALF: tl.constexpr = TILE.block_rows // 2
    TOKENS: tl.constexpr = TILE.block_tokens
    token = tl.arange(0, TOKENS)
    if WEIGHT_ON_INPUT:
        choice = tl.load(choices_ptr + _positions(begin, count, TILE))
        result *= tl.load(topk_weights_ptr + choice).to(tl.float32)[None, :]
    gate, up = tl.split(tl.permute(tl.reshape(result, (HALF // 8, 2, 8, TOKENS)), (0, 2, 3, 1)))
    gate = tl.reshape(gate, (HALF, TOKENS))
    up = tl.reshape(up, (HALF, TOKENS))
    row = (tile * HALF + tl.arange(0, HALF))[:, None]
    position = (begin + token)[None, :].to(tl.int64)
    mask = (row < TILE.rows) & (token < count)[None, :]
    if TILE.split_k == 1:
        inner = activate(gate, ACTIVATION) * up
        tl.store(inner_ptr + position * TILE.rows + row, inner.to(TILE.dtype), mask=mask)
    else:
        partial_ptr = inner_ptr + (tl.cast(split, tl.int64) * num_choices + position) * (2 * TILE.rows) + row
        tl.store(partial_ptr, gate, mask=mask)
        tl.store(partial_ptr + TILE.rows, up, mask=mask)


# Numbers that follow from the number of tokens are not specialized on: each would compile the kernel again.
@triton.jit(do_not_specialize=["num_blocks", "num_choices", "top_k"])
def gate_up_kernel(
    x_ptr,
    w13_ptr,
    inner_ptr,
    topk_weights_ptr,
    choices_ptr,
    blocks_ptr,
    num_blocks,
    num_choices,
    top_k,
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
):
    """activation(gate) * up of every routed choice.

    x: (num_tokens, hidden_size); w13: (num_slots, 2 * intermediate_size, hidden_size), words; topk_weights: flat;
    choices and blocks: see `routing.Routing`; inner: (num_choices, intermediate_size) in x's dtype, in routed order;
    with split_k (split_k, num_choices, 2, intermediate_size) in float32, for `activate_kernel`.
    Grid: (tiles of rows * num_blocks, split_k).
    """
    tile, slot, begin_0, count_0, begin_1, count_1 = _block(blocks_ptr, num_blocks)
    split = tl.program_id(1) if TILE.split_k > 1 else 0
    w13_ptr += slot * (2 * TILE.rows * TILE.k)
    w_rows = _gate_up_rows(tile, TILE)
    outputs = (inner_ptr, topk_weights_ptr, choices_ptr, num_choices, tile, split)
    # One after the other, not `elif`: of branches of one `if` Triton 3.8 adds up the shared memory.
    if (TILE.members == 2) & (count_0 > 0) & (count_1 > 0):
        x_rows_0 = _gathered_rows(choices_ptr, top_k, begin_0, count_0, TILE)
        x_rows_1 = _gathered_rows(choices_ptr, top_k, begin_1, count_1, TILE)
        result_0, result_1 = _multiply_both(w13_ptr, x_ptr, w_rows, x_rows_0, x_rows_1, split, TILE)
        _store_inner(result_0, begin_0, count_0, outputs, TILE, ACTIVATION, WEIGHT_ON_INPUT)
        _store_inner(result_1, begin_1, count_1, outputs, TILE, ACTIVATION, WEIGHT_ON_INPUT)
    if (count_0 > 0) & (count_1 == 0):
        x_rows_0 = _gathered_rows(choices_ptr, top_k, begin_0, count_0, TILE)
        result_0 = _multiply_one(w13_ptr, x_ptr, w_rows, x_rows_0, split, TILE, 0)
        _store_inner(result_0, begin_0, count_0, outputs, TILE, ACTIVATION, WEIGHT_ON_INPUT)
    if (count_0 == 0) & (count_1 > 0):
        x_rows_1 = _gathered_rows(choices_ptr, top_k, begin_1, count_1, TILE)
        result_1 = _multiply_one(w13_ptr, x_ptr, w_rows, x_rows_1, split, TILE, 1)
        _store_inner(result_1, begin_1, count_1, outputs, TILE, ACTIVATION, WEIGHT_ON_INPUT)


@triton.jit
def _store_down(result, begin, count, outputs, TILE: tl.constexpr):
    """result: (block_rows, block_tokens); outputs: what `down_kernel` makes of them."""
    partial_ptr, choices_ptr, num_choices, tile, split = outputs
    choice = tl.load(choices_ptr + _positions(begin, count, TILE)).to(tl.int64)
    row = (tile * TILE.block_rows + tl.arange(0, TILE.block_rows))[:, None]
    pointers = partial_ptr + (tl.cast(split, tl.int64) * num_choices + choice)[None, :] * TILE.rows + row
    mask = (row < TILE.rows) & (tl.arange(0, TILE.block_tokens) < count)[None, :]
    tl.store(pointers, result.to(partial_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_blocks", "num_choices"])
def down_kernel(
    inner_ptr,
    w2_ptr,
    partial_ptr,
    choices_ptr,
    blocks_ptr,
    num_blocks,
    num_choices,
    TILE: tl.constexpr,
):
    """The down projection of every routed choice, for `combine_kernel` to weigh and add up.

    inner: (num_choices, intermediate_size), in routed order; w2: (num_slots, hidden_size, intermediate_size), words;
    partial: (split_k, num_choices, hidden_size), in the order of topk_ids. Grid: (tiles of rows * num_blocks, split_k).
    """
    tile, slot, begin_0, count_0, begin_1, count_1 = _block(blocks_ptr, num_blocks)
    split = tl.program_id(1) if TILE.split_k > 1 else 0
    row = tile * TILE.block_rows + tl.arange(0, TILE.block_rows)
    if TILE.rows % TILE.block_rows != 0:
        row = tl.minimum(row, TILE.rows - 1)
    w2_ptr += slot * (TILE.rows * TILE.k)
    w_rows = row * TILE.k
    x_rows_0 = _positions(begin_0, count_0, TILE).to(tl.int64) * TILE.k
    x_rows_1 = _positions(begin_1, count_1, TILE).to(tl.int64) * TILE.k
    outputs = (partial_ptr, choices_ptr, num_choices, tile, split)
    # One after the other, not `elif`: of branches of one `if` Triton 3.8 adds up the shared memory.
    if (TILE.members == 2) & (count_0 > 0) & (count_1 > 0):
        result_0, result_1 = _multiply_both(w2_ptr, inner_ptr, w_rows, x_rows_0, x_rows_1, split, TILE)
        _store_down(result_0, begin_0, count_0, outputs, TILE)
        _store_down(result_1, begin_1, count_1, outputs, TILE)
    if (count_0 > 0) & (count_1 == 0):
        result_0 = _multiply_one(w2_ptr, inner_ptr, w_rows, x_rows_0, split, TILE, 0)
        _store_down(result_0, begin_0, count_0, outputs, TILE)
    if (count_0 == 0) & (count_1 > 0):
        result_1 = _multiply_one(w2_ptr, inner_ptr, w_rows, x_rows_1, split, TILE, 1)
        _store_down(result_1, begin_1, count_1, outputs, TILE)
