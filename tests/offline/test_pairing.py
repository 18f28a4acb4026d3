"""Pairing: as many pairs as asked for, within each rank, the best ones, and the same for the same seed."""

import itertools
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_puzzle.offline.conversion.pairing import (
    PairBudget,
    budget_pairs,
    count_pairs,
    draw_mates,
    draw_slots,
    layer_slots,
    list_candidates,
    match_pairs,
    spend_budget,
)
from vllm_puzzle.offline.errors import CheckpointError
from vllm_puzzle.offline.merging.pair_loss import Mates


@given(st.integers(1, 8), st.integers(1, 12), st.floats(0, 1), st.integers(0, 2**32))
def test_mates_are_of_one_rank(ranks: int, half: int, share: float, seed: int) -> None:
    num_experts = ranks * 2 * half
    pairs = int(share * num_experts / 2)
    slots = draw_slots(3, num_experts, pairs, ranks, random.Random(seed))
    assert slots.pairs == pairs
    assert sorted(slots.experts) == list(range(num_experts))
    for slot in range(pairs):
        first, second = slots.members(slot)
        assert first // (2 * half) == second // (2 * half)
    assert slots == draw_slots(3, num_experts, pairs, ranks, random.Random(seed))


def test_single_experts_are_drawn_too() -> None:
    """Every one of 16 experts stays alone for some seed, and has a mate for another."""
    single = [set(draw_slots(0, 16, 4, 2, random.Random(seed)).experts[8:]) for seed in range(20)]
    assert {len(each) for each in single} == {8}
    assert set.union(*single) == set(range(16))
    assert set.intersection(*single) == set()


@pytest.mark.parametrize(
    ("num_experts", "compression", "pairs"), [(8, 50, 4), (8, 25, 2), (60, 25, 15), (7, 50, 3), (8, 0, 0), (8, 12.5, 1)]
)
def test_compression_becomes_pairs(num_experts: int, compression: float, pairs: int) -> None:
    assert count_pairs(num_experts, compression, 1) == pairs


@pytest.mark.parametrize(
    ("num_experts", "compression", "budget"),
    [
        (8, 50, PairBudget(2, per_layer=4, total=12, all_paired=True)),
        # Two pairs in every layer, and one more somewhere.
        (8, 30, PairBudget(2, per_layer=2, total=7, all_paired=False)),
        # An odd number leaves one expert of each layer alone.
        (7, 50, PairBudget(1, per_layer=3, total=9, all_paired=True)),
        (8, 0, PairBudget(2, per_layer=0, total=0, all_paired=False)),
    ],
)
def test_pairs_of_three_layers(num_experts: int, compression: float, budget: PairBudget) -> None:
    assert budget_pairs(num_experts, 3, compression) == budget


def test_ranks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CheckpointError, match="--max-expert-parallel 3 does not cut 8 experts"):
        count_pairs(8, 50, 3)
    with pytest.raises(CheckpointError, match=r"needs 30 pairs, but 4 ranks of 15 experts hold at most 28.*46\.67"):
        count_pairs(60, 50, 4)


@given(st.integers(1, 4), st.integers(2, 7))
def test_candidates_are_every_two_experts_of_a_rank_once(ranks: int, size: int) -> None:
    expected = {
        (first, second)
        for first, second in itertools.combinations(range(ranks * size), 2)
        if first // size == second // size
    }
    found = list_candidates(ranks * size, ranks)
    assert len(found) == len(expected)
    assert set(found) == expected


@given(st.integers(1, 4), st.integers(2, 7), st.integers(0, 2**32))
def test_drawn_mates_are_as_many_candidates_as_there_can_be(ranks: int, size: int, seed: int) -> None:
    drawn = draw_mates(ranks * size, ranks, random.Random(seed))
    assert len(drawn) == ranks * (size // 2)
    assert len({expert for pair in drawn for expert in pair}) == 2 * len(drawn)
    assert {tuple(sorted(pair)) for pair in drawn} <= set(list_candidates(ranks * size, ranks))


def matchings(ids: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Every way to leave at most one of `ids` without a mate."""
    if len(ids) < 2:
        yield []
        return
    for mate in ids[1:]:
        rest = [each for each in ids[1:] if each != mate]
        yield from ([(ids[0], mate), *others] for others in matchings(rest))
    if len(ids) % 2:
        yield from matchings(ids[1:])


SIX = list_candidates(6, 1)
losses = st.lists(st.floats(0, 1e3), min_size=len(SIX), max_size=len(SIX))
shares = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=len(SIX), max_size=len(SIX))


@settings(max_examples=50)
@given(losses, shares, st.sampled_from([1e-9, 1.0, 1e9]))
def test_no_other_matching_is_better(losses: list[float], shares: list[float], unit: float) -> None:
    mates = {pair: Mates(pair, unit * loss, share) for pair, loss, share in zip(SIX, losses, shares, strict=True)}
    every = [[mates[pair] for pair in matching] for matching in matchings(list(range(6)))]
    assert len(every) == 15

    def loss(matching: list[Mates]) -> float:
        return sum(each.loss for each in matching)

    def coactivation(matching: list[Mates]) -> float:
        return sum(each.coactivation for each in matching)

    slack = 1e-9 * unit
    by_loss, together = match_pairs(mates.values(), "loss"), match_pairs(mates.values(), "coactivation")
    for matching in (by_loss, together):
        assert sorted(expert for each in matching for expert in each.experts) == list(range(6))
    assert loss(by_loss) <= min(map(loss, every)) + slack * 1e3
    assert coactivation(together) == max(map(coactivation, every))
    # Among those that fire together as much, the one that loses least.
    as_good = [loss(matching) for matching in every if coactivation(matching) == coactivation(together)]
    assert loss(together) <= min(as_good) + 1e-6 * unit * 1e3


@pytest.mark.parametrize("pairing", ["loss", "coactivation"])
@pytest.mark.parametrize(("num_experts", "ranks"), [(12, 3), (10, 2), (7, 1)])
def test_matched_mates_stay_on_their_ranks(num_experts: int, ranks: int, pairing: str) -> None:
    generator = random.Random(5)
    size = num_experts // ranks
    mates = [Mates(pair, generator.random(), generator.random()) for pair in list_candidates(num_experts, ranks)]
    matched = match_pairs(mates, pairing)
    assert len(matched) == ranks * (size // 2)
    assert len({expert for each in matched for expert in each.experts}) == 2 * len(matched)
    assert all(each.experts[0] // size == each.experts[1] // size for each in matched)
    assert match_pairs(reversed(mates), pairing) == matched


def test_as_many_pairs_as_can_be_whatever_they_lose() -> None:
    """Two cheap pairs next to each other do not leave the ends alone."""
    mates = [Mates((0, 1), 1e6, 0.0), Mates((1, 2), 0.0, 1.0), Mates((2, 3), 1e6, 0.0)]
    for pairing in ("loss", "coactivation"):
        assert [each.experts for each in match_pairs(mates, pairing)] == [(0, 1), (2, 3)]


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0, 7.5]), max_size=4), min_size=1, max_size=5), st.integers(0, 25)
)
def test_the_budget_goes_to_the_cheapest_pairs_of_all_layers(losses: list[list[float]], budget: int) -> None:
    mates = {
        layer: [Mates((2 * pair, 2 * pair + 1), loss, 0.5) for pair, loss in enumerate(row)]
        for layer, row in enumerate(losses)
    }
    chosen = spend_budget(budget, mates)
    assert chosen.keys() == mates.keys()
    taken = [each for row in chosen.values() for each in row]
    left = [each for layer, row in mates.items() for each in row if each not in chosen[layer]]
    assert len(taken) == min(budget, len(taken) + len(left))
    assert max((each.loss for each in taken), default=0.0) <= min((each.loss for each in left), default=8.0)
    # Ties too stand for the same pairs, in whatever order they are found.
    shuffled = {layer: mates[layer][::-1] for layer in reversed(mates)}
    again = spend_budget(budget, shuffled)
    assert {layer: set(row) for layer, row in again.items()} == {layer: set(row) for layer, row in chosen.items()}


def test_slots_are_pairs_in_the_order_of_their_ids_and_then_the_others() -> None:
    slots = layer_slots(3, 8, [(6, 2), (0, 5)])
    assert (slots.layer, slots.pairs) == (3, 2)
    assert slots.experts == [0, 5, 6, 2, 1, 3, 4, 7]
