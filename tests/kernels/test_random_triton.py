"""The Triton engine: calls of random shapes and routing, cut in every way, and random choices sorted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cases import TRITON_DEVICE, Case
from tests.kernels.cuts import CUTS, Cut, check
from vllm_puzzle.kernels.triton.routing import route
from vllm_puzzle.kernels.triton.target import INTERPRETED

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.mark.heavy
@settings(max_examples=10)
@given(
    num_tokens=st.integers(1, 20),
    num_experts=st.integers(1, 10),
    share=st.floats(0, 0.5),
    hidden_size=st.integers(16, 70),
    intermediate_size=st.integers(16, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    cut=st.sampled_from(CUTS),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_random_calls(
    num_tokens: int,
    num_experts: int,
    share: float,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    cut: Cut,
    seed: int,
    data: st.DataObject,
) -> None:
    top_k = data.draw(st.integers(1, min(num_experts, 6)))
    pairs = int(share * num_experts)
    check(Case(num_tokens, num_experts, pairs, top_k, hidden_size, intermediate_size, dtype, seed), cut)


@pytest.mark.heavy
@settings(max_examples=8)
@given(
    num_tokens=st.one_of(st.integers(1, 30), st.integers(200, 500)),
    top_k=st.integers(1, 8),
    num_slots=st.integers(1, 70),
    members=st.sampled_from([1, 2]),
    block_tokens=st.sampled_from([8, 16, 64]),
    skew=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_choices_are_sorted_and_cut(
    num_tokens: int, top_k: int, num_slots: int, members: int, block_tokens: int, skew: int, seed: int
) -> None:
    """Of any number of choices, sorted in one chunk or in several."""
    generator = torch.Generator().manual_seed(seed)
    slot_of_expert = torch.randperm(2 * num_slots, generator=generator).int()
    slot_of_expert[torch.rand(2 * num_slots, generator=generator) < 0.1] = -1
    drawn = torch.rand(num_tokens, top_k, generator=generator) ** skew * (2 * num_slots + 1)
    topk_ids = drawn.int() - 1
    routing = route(topk_ids.to(TRITON_DEVICE), slot_of_expert.to(TRITON_DEVICE), num_slots, members, block_tokens)

    flat = topk_ids.flatten().long()
    codes = torch.where(flat >= 0, slot_of_expert[flat], -1)
    in_blocks = []
    for slot, *spans in routing.blocks.T.tolist():
        assert members == 2 or not all(spans[1::2])
        for member, (begin, count) in enumerate(zip(spans[::2], spans[1::2], strict=True)):
            assert 0 <= count <= block_tokens
            choices = routing.choices[begin : begin + count].tolist()
            assert all(codes[choice] == 2 * slot + member for choice in choices)
            in_blocks += choices
    expected = sorted((code, choice) for choice, code in enumerate(codes.tolist()) if code >= 0)
    assert sorted(in_blocks) == sorted(choice for _, choice in expected)
    assert routing.choices[: len(expected)].tolist() == [choice for _, choice in expected]
