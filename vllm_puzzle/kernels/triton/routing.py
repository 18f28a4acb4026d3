"""Sorting the routed choices by slot and member, and cutting them into blocks, on the device and without a wait.

Choice `token * top_k + k` of the flat topk_ids gets the code `2 * slot + member` of its expert. Choices are put in the
order of their codes (stable, so that a result does not depend on scheduling), those without a slot behind all others,
and a block is what one program multiplies: some tokens of one slot. All sizes follow from the shapes alone.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# One program sorts so many choices; more are sorted in chunks, between which a table of counts is kept.
CHUNK = 1024
# The smallest chunk gives every thread of a warp a choice of its own, AMD's of 64 threads too: Triton's histogram
# divides by how often a value is repeated among threads, which is better not relied upon.
SMALLEST_CHUNK = 64
BLOCK_FIELDS = 5


@dataclass(frozen=True)
class Routing:
    """
    Attributes:
        choices: (num_choices,), int32, the choices in the order of their codes.
        blocks: (5, num_blocks), int32: slot; first position in `choices` and number of tokens of member 0; the same of
            member 1. Blocks that were not needed have no tokens.
    """

    choices: torch.Tensor
    blocks: torch.Tensor

    @property
    def num_blocks(self) -> int:
        return self.blocks.shape[1]


def most_blocks(num_choices: int, num_slots: int, members: int, block_tokens: int) -> int:
    """How many blocks `num_choices` can fill at most, however they are routed."""
    groups = num_slots if members == 2 else 2 * num_slots
    return min(num_choices, groups + num_choices // block_tokens)


def warps(chunk: int) -> int:
    """The number of warps that count and sort a chunk."""
    return min(4, chunk // SMALLEST_CHUNK)


def route(
    topk_ids: torch.Tensor, slot_of_expert: torch.Tensor, num_slots: int, members: int, block_tokens: int
) -> Routing:
    """Sorts and cuts.

    Args:
        topk_ids: (num_tokens, top_k), int32 or int64, contiguous, not empty.
        slot_of_expert: (num_global_experts,), int32.
        members: 2, a block has up to block_tokens tokens of each member of a slot; 1, of one member.
    """
    num_choices = topk_ids.numel()
    choices = torch.empty(num_choices, dtype=torch.int32, device=topk_ids.device)
    num_blocks = most_blocks(num_choices, num_slots, members, block_tokens)
    blocks = torch.empty(BLOCK_FIELDS, num_blocks, dtype=torch.int32, device=topk_ids.device)
    bins = triton.next_power_of_2(2 * num_slots + 1)
    chunk = min(CHUNK, max(SMALLEST_CHUNK, triton.next_power_of_2(num_choices)))
    num_chunks = triton.cdiv(num_choices, chunk)
    counts = blocks  # Not read where there is one chunk.
    if num_chunks > 1:
        counts = torch.empty(num_chunks, bins, dtype=torch.int32, device=topk_ids.device)
        count_kernel[(num_chunks,)](
            topk_ids, slot_of_expert, counts, num_choices, num_slots, CHUNK=chunk, BINS=bins, num_warps=warps(chunk)
        )
    place_kernel[(num_chunks,)](
        topk_ids,
        slot_of_expert,
        counts,
        choices,
        blocks,
        num_choices,
        num_slots,
        num_blocks,
        num_chunks,
        CHUNK=chunk,
        BINS=bins,
        ONE_CHUNK=num_chunks == 1,
        MEMBERS=members,
        BLOCK_TOKENS=block_tokens,
        num_warps=warps(chunk),
    )
    return Routing(choices, blocks)


@triton.jit
def _codes(topk_ids_ptr, slot_of_expert_ptr, choice, num_choices, num_slots):
    """The codes of choices; 2 * num_slots for those that no slot here computes."""
    expert = tl.load(topk_ids_ptr + choice, mask=choice < num_choices, other=-1)
    code = tl.load(slot_of_expert_ptr + expert, mask=expert >= 0, other=-1)
    return tl.where(code >= 0, code, 2 * num_slots)


@triton.jit(do_not_specialize=["num_choices", "num_slots"])
def count_kernel(
    topk_ids_ptr, slot_of_expert_ptr, counts_ptr, num_choices, num_slots, CHUNK: tl.constexpr, BINS: tl.constexpr
):
    """counts: (num_chunks, BINS), how many choices of each chunk have each code."""
    chunk = tl.program_id(0)
    codes = _codes(topk_ids_ptr, slot_of_expert_ptr, chunk * CHUNK + tl.arange(0, CHUNK), num_choices, num_slots)
    tl.store(counts_ptr + chunk * BINS + tl.arange(0, BINS), tl.histogram(codes, BINS))


@triton.jit(do_not_specialize=["num_choices", "num_slots", "num_blocks", "num_chunks"])
def place_kernel(
    topk_ids_ptr,
    slot_of_expert_ptr,
    counts_ptr,
    choices_ptr,
    blocks_ptr,
    num_choices,
    num_slots,
    num_blocks,
    num_chunks,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Sorts one chunk of choices into its places; the first program writes the blocks."""
    chunk = tl.program_id(0)
    index = tl.arange(0, CHUNK)
    codes = _codes(topk_ids_ptr, slot_of_expert_ptr, chunk * CHUNK + index, num_choices, num_slots)
    keys = tl.sort(codes * CHUNK + index)
    choices = chunk * CHUNK + keys % CHUNK
    totals = tl.histogram(codes, BINS)
    places = index
    if not ONE_CHUNK:
        # From the place within the chunk to that among all: after all smaller codes, and after the same code before.
        here = totals
        before = tl.zeros((BINS,), tl.int32)
        totals = tl.zeros((BINS,), tl.int32)
        for other in range(num_chunks):
            counts = tl.load(counts_ptr + other * BINS + tl.arange(0, BINS))
            before += tl.where(other < chunk, counts, 0)
            totals += counts
        moved = (tl.cumsum(totals) - totals) + before - (tl.cumsum(here) - here)
        places += tl.gather(moved, keys // CHUNK, 0)
    tl.store(choices_ptr + places, choices, mask=choices < num_choices)
    if chunk == 0:
        _write_blocks(blocks_ptr, totals, num_slots, num_blocks, BINS, MEMBERS, BLOCK_TOKENS)


@triton.jit
def _write_blocks(
    blocks_ptr,
    totals,
    num_slots,
    num_blocks,
    BINS: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """totals: (BINS,), the number of choices of each code."""
    first = tl.cumsum(totals) - totals
    code = tl.arange(0, BINS)
    totals = tl.where(code < 2 * num_slots, totals, 0)
    if MEMBERS == 2:
        slot = tl.arange(0, BINS // 2)
        begin_0, begin_1 = tl.split(tl.reshape(first, (BINS // 2, 2)))
        count_0, count_1 = tl.split(tl.reshape(totals, (BINS // 2, 2)))
    else:
        slot = code // 2
        begin_0 = first
        begin_1 = first
        count_0 = tl.where(code % 2 == 0, totals, 0)
        count_1 = tl.where(code % 2 == 1, totals, 0)
    needed = tl.cdiv(tl.maximum(count_0, count_1), BLOCK_TOKENS)
    block = tl.cumsum(needed) - needed
    for part in range(tl.max(needed)):
        here = part < needed
        skipped = part * BLOCK_TOKENS
        pointers = blocks_ptr + block + part
        tl.store(pointers, slot, mask=here)
        tl.store(pointers + num_blocks, begin_0 + skipped, mask=here)
        tl.store(pointers + 2 * num_blocks, tl.maximum(tl.minimum(count_0 - skipped, BLOCK_TOKENS), 0), mask=here)
        tl.store(pointers + 3 * num_blocks, begin_1 + skipped, mask=here)
        tl.store(pointers + 4 * num_blocks, tl.maximum(tl.minimum(count_1 - skipped, BLOCK_TOKENS), 0), mask=here)
    for unused in range(tl.sum(needed), num_blocks, BINS):
        rest = unused + code
        for field in tl.static_range(5):
            tl.store(blocks_ptr + field * num_blocks + rest, 0, mask=rest < num_blocks)
