"""What surrounds the products: the activation of sums that were split, and the weighted sum over a token's choices."""

import triton
import triton.language as tl

from .activations import activate


@triton.jit(do_not_specialize=["num_choices"])
def activate_kernel(
    partial_ptr,
    inner_ptr,
    num_choices,
    ROWS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """inner = activation(gate) * up, where several programs of `gate_up_kernel` shared a sum.

    partial: (SPLIT_K, num_choices, 2, ROWS), float32; inner: (num_choices, ROWS). Grid: (num_choices, blocks of ROWS).
    Positions that no block covers hold what was in memory; nobody reads what becomes of them.
    """
    position = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = row < ROWS
    gate = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT_K):
        pointers = partial_ptr + (split * num_choices + position) * (2 * ROWS) + row
        gate += tl.load(pointers, mask=mask, other=0)
        up += tl.load(pointers + ROWS, mask=mask, other=0)
    inner = activate(gate, ACTIVATION) * up
    tl.store(inner_ptr + position * ROWS + row, inner.to(inner_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_choices"])
def combine_kernel(
    partial_ptr,
    topk_weights_ptr,
    topk_ids_ptr,
    slot_of_expert_ptr,
    output_ptr,
    num_choices,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """output = the sum over a token's choices of router weight * result.

    partial: (SPLIT_K, num_choices, ROWS), of which choices without a slot here were not written; output:
    (num_tokens, ROWS). Grid: (num_tokens, blocks of ROWS).
    """
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = row < ROWS
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        choice = token * TOP_K + k
        expert = tl.load(topk_ids_ptr + choice)
        here = (expert >= 0) & (tl.load(slot_of_expert_ptr + expert, mask=expert >= 0, other=-1) >= 0)
        result = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLIT_K):
            pointers = partial_ptr + (split * num_choices + choice) * ROWS + row
            result += tl.load(pointers, mask=mask & here, other=0).to(tl.float32)
        if not WEIGHT_ON_INPUT:
            # The weight of a choice that is skipped may be NaN, and 0 * NaN is NaN.
            result *= tl.load(topk_weights_ptr + choice, mask=here, other=0).to(tl.float32)
        total += result
    tl.store(output_ptr + token * ROWS + row, total.to(output_ptr.dtype.element_ty), mask=mask)
