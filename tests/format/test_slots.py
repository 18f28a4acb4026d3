"""Slots: who shares one, where an expert is found, and how they divide among ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_puzzle.format import FormatError, LayerSlots, default_max_expert_parallel


@st.composite
def layer_slots(draw: st.DrawFn) -> LayerSlots:
    experts = draw(st.permutations(range(draw(st.integers(1, 24)))))
    return LayerSlots(layer=0, experts=list(experts), pairs=draw(st.integers(0, len(experts) // 2)))


@given(layer_slots())
def test_every_expert_is_found_in_the_slot_that_lists_it(slots: LayerSlots) -> None:
    table = slots.slot_of_expert()
    assert table.dtype == torch.int32
    assert slots.num_slots == slots.num_experts - slots.pairs
    for slot in range(slots.num_slots):
        assert table[slots.first_member(slot)] == 2 * slot
        for member, expert in enumerate(slots.members(slot)):
            assert table[expert] == 2 * slot + member
    assert len(set(table.tolist())) == slots.num_experts


@given(layer_slots())
def test_a_rank_has_whole_slots_and_numbers_them_from_zero(slots: LayerSlots) -> None:
    held = {expert for slot in range(0, slots.num_slots, 2) for expert in slots.members(slot)}
    local = slots.local_slots(held)
    table = slots.slot_of_expert(local)
    assert {expert for expert in range(slots.num_experts) if table[expert] >= 0} == held
    assert {code // 2 for code in table.tolist() if code >= 0} == set(range(len(local)))


def test_a_split_pair_is_refused() -> None:
    slots = LayerSlots(layer=4, experts=[0, 2, 1, 3], pairs=2)
    with pytest.raises(FormatError, match=r"layer 4: experts 0 and 2 share slot 0, .* only expert 0 on this rank"):
        slots.local_slots({0, 1})


@pytest.mark.parametrize(
    ("experts", "pairs", "message"),
    [
        ([0, 1, 1, 3], 2, "not a permutation"),
        ([1, 2, 3, 4], 2, "not a permutation"),
        ([0, 1, 2], 2, "2 pairs do not fit 3 experts"),
        ([0, 1], -1, "-1 pairs do not fit"),
    ],
)
def test_inconsistent_slots_are_refused(experts: list[int], pairs: int, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LayerSlots(layer=0, experts=experts, pairs=pairs)


@pytest.mark.parametrize(
    ("num_experts", "ranks"), [(8, 2), (16, 4), (32, 8), (60, 2), (64, 8), (128, 8), (256, 8), (6, 1), (7, 1), (4, 1)]
)
def test_by_default_a_rank_has_an_even_number_of_at_least_four_experts(num_experts: int, ranks: int) -> None:
    assert default_max_expert_parallel(num_experts) == ranks
