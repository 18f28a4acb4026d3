"""A merging rule is one object: what it takes to add one."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from tests.offline.small import merge_layer, slots_of, small_experts, small_tokens
from vllm_puzzle.offline.merging.layer import ExpertWeights
from vllm_puzzle.offline.merging.pair import Packed, pack_pair
from vllm_puzzle.offline.merging.recipe import Recipe
from vllm_puzzle.offline.merging.rules import BEST_FIRST, RULES, Mating, Rule


@dataclass(frozen=True)
class _FirstWins(Rule):
    """Keeps the first mate whole and leaves nothing of the second."""

    def pack(self, mating: Mating) -> Iterator[Packed]:
        first, _ = mating.pair
        gate, up, down = ([matrix, torch.zeros_like(matrix)] for matrix in mating.experts.matrices(first))
        merged = ExpertWeights(gate, up, down, mating.experts.activation)
        return pack_pair(merged, mating.experts, mating.pair, mating.names)


FIRST_WINS = _FirstWins("first", estimates_loss=False)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_rule_of_ones_own_merges_a_layer(calibrated: bool) -> None:
    experts = small_experts()
    routed = small_tokens(60) if calibrated else None
    packed = merge_layer(experts, slots_of([(4, 1), (0, 5)]), Recipe(FIRST_WINS), routed)
    for kept, lost in ((4, 1), (0, 5)):
        for own, stored in zip(experts.matrices(kept), packed.experts.matrices(kept), strict=True):
            # Magnitudes below the smallest storable one are raised or dropped.
            torch.testing.assert_close(stored, own, rtol=0, atol=2.0**-15)
        assert all(not bool(matrix.any()) for matrix in packed.experts.matrices(lost))
    assert packed.statistics.shared == 0


def test_rules_are_found_by_their_names() -> None:
    assert {name: rule.name for name, rule in RULES.items()} == {name: name for name in RULES}
    assert set(BEST_FIRST) <= set(RULES.values())
    # Without calibration and in parallel something must be left to choose.
    assert any(not (rule.needs_tokens or rule.sequential) for rule in BEST_FIRST)
