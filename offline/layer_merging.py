"""One layer: its pairs merged, its slots packed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_puzzle.format import LayerSlots, unpack

from .correction import OutputCorrection
from .experts import check_storable
from .layer import ExpertWeights, RoutedTokens
from .mates import Mates, expect
from .merging import (
    MergeStatistics,
    align_mates,
    compare,
    merge_as_the_paper,
    merge_by_compensation,
    merge_by_saliency,
    pack_members,
)
from .recipe import Recipe
from .statistics import ExpertStatistics, input_norms, measure, uniform, uniform_norms


@dataclass(frozen=True)
class PackedLayer:
    """`words` are each slot's gate, up and down, int16, in slot order; `experts` what a reader of them finds.

    `mates` are what the pairs were expected to lose, none with the rule `paper`, which estimates nothing.
    """

    words: list[list[torch.Tensor]]
    experts: ExpertWeights
    statistics: MergeStatistics
    mates: list[Mates]


def merge_layer(
    experts: ExpertWeights,
    names: Sequence[Sequence[str]],
    slots: LayerSlots,
    recipe: Recipe,
    routed: RoutedTokens | None = None,
    lacking: torch.Tensor | None = None,
    energy: float = 1.0,
) -> PackedLayer:
    """Merges and packs.

    Args:
        experts: the layer's own; where mates are aligned, their neurons are put in another order here.
        names: what an error calls gate, up and down of each expert.
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
    stored = experts.copy()
    words, total = [], MergeStatistics()
    expected: list[Mates] = []
    for slot in range(slots.num_slots):
        members = slots.members(slot)
        merged = [experts.matrices(expert) for expert in members]
        if len(members) == 2:
            first, second = members
            pair = (first, second)
            if recipe.rule == "paper":
                two = _merge_as_the_paper(experts, pair, recipe.tau, routed)
            else:
                statistics = [_measure(experts, expert, recipe, routed) for expert in pair]
                expected.append(expect(experts, pair, statistics, routed, energy))
                two = _merge(experts, pair, recipe, statistics, correction)
            merged = [two.matrices(member) for member in (0, 1)]
        packed = [
            pack_members(mates, name) for mates, name in zip(zip(*merged, strict=True), names[members[0]], strict=True)
        ]
        if len(members) == 2:
            sources = zip(*(experts.matrices(expert) for expert in members), strict=True)
            for matrix, mates in zip(packed, sources, strict=True):
                total.add(compare(matrix, mates))
        for member, expert in enumerate(members):
            stored.gate[expert], stored.up[expert], stored.down[expert] = (unpack(matrix, member) for matrix in packed)
        words.append([matrix.cpu() for matrix in packed])
    return PackedLayer(words, stored, total, expected)


def _merge_as_the_paper(
    experts: ExpertWeights, pair: tuple[int, int], tau: float, routed: RoutedTokens | None
) -> ExpertWeights:
    norms = [input_norms(experts, expert, routed) if routed else uniform_norms(experts, expert) for expert in pair]
    return merge_as_the_paper(experts, pair, norms, tau)


def _measure(experts: ExpertWeights, expert: int, recipe: Recipe, routed: RoutedTokens | None) -> ExpertStatistics:
    return measure(experts, expert, routed, full=recipe.compensated) if routed else uniform(experts, expert)


def _merge(
    experts: ExpertWeights,
    pair: tuple[int, int],
    recipe: Recipe,
    statistics: Sequence[ExpertStatistics],
    correction: OutputCorrection | None,
) -> ExpertWeights:
    if recipe.align:
        statistics = align_mates(experts, pair, statistics)
    if correction is not None:
        return merge_by_compensation(experts, pair, statistics, correction)
    return merge_by_saliency(experts, pair, statistics)
