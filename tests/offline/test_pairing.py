"""Random pairing: as many pairs as asked for, inside the blocks, and the same for the same seed."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_puzzle.offline.errors import CheckpointError
from vllm_puzzle.offline.pairing import count_pairs, pair_at_random


@given(st.integers(1, 8), st.integers(1, 12), st.floats(0, 1), st.integers(0, 2**32))
def test_mates_lie_in_one_block(blocks: int, half: int, share: float, seed: int) -> None:
    num_experts = blocks * 2 * half
    pairs = int(share * num_experts / 2)
    slots = pair_at_random(3, num_experts, pairs, blocks, random.Random(seed))
    assert slots.pairs == pairs
    assert sorted(slots.experts) == list(range(num_experts))
    for slot in range(pairs):
        first, second = slots.members(slot)
        assert first // (2 * half) == second // (2 * half)
    assert slots == pair_at_random(3, num_experts, pairs, blocks, random.Random(seed))


def test_single_experts_are_drawn_too() -> None:
    drawn = {tuple(pair_at_random(0, 16, 4, 2, random.Random(seed)).experts[8:]) for seed in range(20)}
    assert len(drawn) > 15


@pytest.mark.parametrize(
    ("num_experts", "compression", "pairs"), [(8, 50, 4), (8, 25, 2), (60, 25, 15), (7, 50, 3), (8, 0, 0), (8, 12.5, 1)]
)
def test_compression_becomes_pairs(num_experts: int, compression: float, pairs: int) -> None:
    assert count_pairs(num_experts, compression, 1) == pairs


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CheckpointError, match="--max-expert-parallel 3 does not cut 8 experts"):
        count_pairs(8, 50, 3)
    with pytest.raises(CheckpointError, match=r"needs 30 pairs, but 4 blocks of 15 experts hold at most 28.*46\.67"):
        count_pairs(60, 50, 4)
