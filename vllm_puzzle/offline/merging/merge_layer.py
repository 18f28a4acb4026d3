"""Merging the pairs of one layer, and packing its slots."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_puzzle.format import LayerSlots, check_storable

from .correction import OutputCorrection
from .layer import Activation, ExpertWeights, LayerTokens
from .pair import (
    MergeStatistics,
    Packed,
    align_mates,
    pack_alone,
)
from .pair_loss import Mates, estimate_pair
from .recipe import Recipe
from .rules import Mating
from .saliency import ExpertStatistics, measure_saliency

Read = Callable[[int], Sequence[torch.Tensor]]
"""Takes an expert's id, returns its gate, up and down."""

Emit = Callable[[int, int, torch.Tensor], None]
"""Takes a slot, the position of a matrix in it (0 for gate, 1 for up, 2 for down) and the matrix's words, int16."""


@dataclass(frozen=True)
class MergedLayer:
    """What merging a layer changed, and what its pairs were expected to lose.

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
    tokens: LayerTokens | None = None,
) -> MergedLayer:
    """Merges and packs one slot after the other; only its own experts are in memory.

    Args:
        read: called once for each expert.
        activation: the experts'.
        names: what an error calls gate, up and down of each expert.
        emit: called with every matrix, in this order, before the next is packed.
        tokens: the calibration tokens at this layer; None weighs by magnitudes alone.

    Raises:
        FormatError: an element that no word can hold; names tensor and index.
    """
    experts = ExpertWeights.unread(len(names), activation)
    correction = None
    if recipe.rule.sequential:
        assert tokens is not None
        assert tokens.lacking is not None
        correction = OutputCorrection(experts, tokens.routed, tokens.lacking)
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
            packed, mates = _merge_pair(experts, pair, slot_names, recipe, tokens, correction)
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
    tokens: LayerTokens | None,
    correction: OutputCorrection | None,
) -> tuple[Iterator[Packed], list[Mates]]:
    """The words of two mates, and what to expect of them; aligning reorders the second's neurons."""
    routed = None if tokens is None else tokens.routed
    statistics: Sequence[ExpertStatistics] = []
    mates = []
    if recipe.rule.estimates_loss:
        full = recipe.rule.full_moments
        statistics = [measure_saliency(experts, expert, routed, full) for expert in pair]
        mates.append(estimate_pair(experts, pair, statistics, tokens))
        if recipe.align:
            statistics = align_mates(experts, pair, statistics)
    mating = Mating(experts, pair, names, routed, statistics, correction, recipe.tau)
    return recipe.rule.pack(mating), mates
