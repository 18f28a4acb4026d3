"""One layer: its pairs merged, its slots packed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_puzzle.format import LayerSlots

from .correction import OutputCorrection
from .experts import check_storable
from .layer import ExpertWeights, RoutedTokens
from .mates import Mates, expect
from .merging import (
    ElementRule,
    MergeStatistics,
    align_mates,
    merge_by_compensation,
    pack_alone,
    pack_pair,
)
from .recipe import Recipe
from .statistics import ExpertStatistics, InputNorms, input_norms, measure, uniform, uniform_norms

Emit = Callable[[int, list[torch.Tensor]], None]
"""Takes a slot and its gate, up and down as words, int16, in the order of slots."""


@dataclass(frozen=True)
class MergedLayer:
    """What merging changed, and what the pairs were expected to lose.

    The rule `paper` estimates nothing, so `mates` is empty then.
    """

    statistics: MergeStatistics
    mates: list[Mates]


def merge_layer(
    experts: ExpertWeights,
    names: Sequence[Sequence[str]],
    slots: LayerSlots,
    recipe: Recipe,
    emit: Emit,
    routed: RoutedTokens | None = None,
    lacking: torch.Tensor | None = None,
    energy: float = 1.0,
) -> MergedLayer:
    """Merges and packs, one slot after the other.

    Args:
        experts: the layer's own; where mates are aligned, their neurons are put in another order here.
        names: what an error calls gate, up and down of each expert.
        emit: told of every slot before the next is begun.
        routed: the calibration tokens at this layer; None weighs by magnitudes alone.
        lacking: what the layer's output lacks, float32 (num_tokens, hidden_size), for the rule `compensated`; see
            `OutputCorrection`.
        energy: see `HiddenStates.energy`.

    Raises:
        FormatError: an element that no word can hold; names tensor and index.
    """
    check_storable(experts, names)
    correction = None
    if recipe.compensated:
        assert routed is not None
        assert lacking is not None
        correction = OutputCorrection(experts, routed, lacking)
    merged = MergedLayer(MergeStatistics(), [])
    for slot in range(slots.num_slots):
        members = slots.members(slot)
        slot_names = names[members[0]]
        if len(members) == 1:
            alone = zip(experts.matrices(members[0]), slot_names, strict=True)
            emit(slot, [pack_alone(matrix, name) for matrix, name in alone])
            continue
        first, second = members
        pair = (first, second)
        if recipe.rule == "paper":
            rule = ElementRule.of_the_paper(_norms(experts, pair, routed), recipe.tau)
            words, changed = rule.pack(experts, pair, slot_names)
        else:
            statistics: Sequence[ExpertStatistics] = [_measure(experts, expert, recipe, routed) for expert in pair]
            merged.mates.append(expect(experts, pair, statistics, routed, energy))
            if recipe.align:
                statistics = align_mates(experts, pair, statistics)
            if correction is None:
                words, changed = ElementRule.of_saliency(statistics).pack(experts, pair, slot_names)
            else:
                two = merge_by_compensation(experts, pair, statistics, correction)
                words, changed = pack_pair(two, experts, pair, slot_names)
        merged.statistics.add(changed)
        emit(slot, words)
    return merged


def _norms(experts: ExpertWeights, pair: tuple[int, int], routed: RoutedTokens | None) -> list[InputNorms]:
    return [input_norms(experts, expert, routed) if routed else uniform_norms(experts, expert) for expert in pair]


def _measure(experts: ExpertWeights, expert: int, recipe: Recipe, routed: RoutedTokens | None) -> ExpertStatistics:
    return measure(experts, expert, routed, full=recipe.compensated) if routed else uniform(experts, expert)
