"""One layer: its pairs merged, its slots packed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_puzzle.format import LayerSlots, check_storable

from .correction import OutputCorrection
from .layer import Activation, ExpertWeights, RoutedTokens
from .pair import (
    MergeStatistics,
    Packed,
    align_mates,
    pack_alone,
)
from .pair_loss import Mates, expect
from .recipe import Recipe
from .rules import Mating
from .saliency import ExpertStatistics, measure, uniform

Read = Callable[[int], Sequence[torch.Tensor]]
"""Takes an expert, answers its gate, up and down."""

Emit = Callable[[int, int, torch.Tensor], None]
"""Takes a slot, 0, 1 or 2 for its gate, up or down, and the words of that, int16; in this order."""


@dataclass(frozen=True)
class MergedLayer:
    """What merging changed, and what the pairs were expected to lose.

    `mates` is empty where the rule estimates nothing.
    """

    statistics: MergeStatistics
    mates: list[Mates]


def merge_layer(
    read: Read,
    activation: Activation,
    names: Sequence[Sequence[str]],
    slots: LayerSlots,
    recipe: Recipe,
    emit: Emit,
    routed: RoutedTokens | None = None,
    lacking: torch.Tensor | None = None,
    energy: float = 1.0,
) -> MergedLayer:
    """Merges and packs, one slot after the other, with no other slot's experts in memory.

    Args:
        read: asked once for each expert.
        activation: of the experts.
        names: what an error calls gate, up and down of each expert.
        emit: told of every matrix before the next is packed.
        routed: the calibration tokens at this layer; None weighs by magnitudes alone.
        lacking: what the layer's output lacks, float32 (num_tokens, hidden_size), for a sequential rule; see
            `OutputCorrection`.
        energy: see `HiddenStates.energy`.

    Raises:
        FormatError: an element that no word can hold; names tensor and index.
    """
    experts = ExpertWeights.unread(len(names), activation)
    correction = None
    if recipe.rule.sequential:
        assert routed is not None
        assert lacking is not None
        correction = OutputCorrection(experts, routed, lacking)
    merged = MergedLayer(MergeStatistics(), [])
    for slot in range(slots.num_slots):
        members = slots.members(slot)
        for expert in members:
            experts.put(expert, read(expert))
            check_storable(experts.matrices(expert), names[expert])
        slot_names = names[members[0]]
        if len(members) == 1:
            packed = pack_alone(experts, members[0], slot_names)
        else:
            pair = (members[0], members[1])
            packed, mates = _merge_pair(experts, pair, slot_names, recipe, routed, energy, correction)
            merged.mates.extend(mates)
        for position, (words, changed) in enumerate(packed):
            merged.statistics.add(changed)
            emit(slot, position, words)
        for expert in members:
            experts.drop(expert)
    return merged


def _merge_pair(
    experts: ExpertWeights,
    pair: tuple[int, int],
    names: Sequence[str],
    recipe: Recipe,
    routed: RoutedTokens | None,
    energy: float,
    correction: OutputCorrection | None,
) -> tuple[Iterator[Packed], list[Mates]]:
    """What two mates become, and what is expected of it; aligned, the second's neurons are moved."""
    statistics: Sequence[ExpertStatistics] = []
    mates = []
    if recipe.rule.estimates_loss:
        statistics = [_measure(experts, expert, recipe, routed) for expert in pair]
        mates.append(expect(experts, pair, statistics, routed, energy))
        if recipe.align:
            statistics = align_mates(experts, pair, statistics)
    mating = Mating(experts, pair, names, routed, statistics, correction, recipe.tau)
    return recipe.rule.pack(mating), mates


def _measure(experts: ExpertWeights, expert: int, recipe: Recipe, routed: RoutedTokens | None) -> ExpertStatistics:
    return measure(experts, expert, routed, recipe.rule.full_moments) if routed else uniform(experts, expert)
