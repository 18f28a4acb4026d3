"""Choosing which experts become mates, and which pairs are worth their bytes."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import networkx

from vllm_puzzle.format import LayerSlots, default_max_expert_parallel

from ..errors import CheckpointError
from ..merging.pair_loss import Mates


@dataclass(frozen=True)
class PairBudget:
    """How many pairs a compression asks for.

    Attributes:
        max_expert_parallel: the ranks that mates stay together for.
        per_layer: pairs of a layer where all layers have as many.
        total: pairs in all MoE layers together.
        all_paired: no expert that could have a mate stays alone.
    """

    max_expert_parallel: int
    per_layer: int
    total: int
    all_paired: bool


def budget_pairs(
    num_experts: int, num_layers: int, compression: float, max_expert_parallel: int | None = None
) -> PairBudget:
    """The pairs that bring `compression` percent in `num_layers` MoE layers.

    Args:
        max_expert_parallel: None takes `default_max_expert_parallel`.

    Raises:
        CheckpointError: see `count_pairs`.
    """
    ranks = max_expert_parallel or default_max_expert_parallel(num_experts)
    per_layer = count_pairs(num_experts, compression, ranks)
    all_paired = per_layer == most_pairs(num_experts, ranks)
    total = per_layer * num_layers if all_paired else _round_down(num_experts * num_layers * compression / 100)
    return PairBudget(ranks, per_layer, total, all_paired)


def count_pairs(num_experts: int, compression: float, max_expert_parallel: int) -> int:
    """How many pairs in one layer bring `compression` percent, rounded down to a whole pair.

    An odd number of experts leaves one single, so 50 % means as many pairs as there can be.

    Raises:
        CheckpointError: the experts do not divide evenly among the ranks, or each rank has too few for that many pairs.
    """
    per_rank, rest = divmod(num_experts, max_expert_parallel)
    if rest or per_rank < 2:
        raise CheckpointError(
            f"--max-expert-parallel {max_expert_parallel} does not cut {num_experts} experts into equal parts of "
            f"2 or more; choose a divisor of {num_experts}"
        )
    pairs = _round_down(num_experts * compression / 100)
    most = most_pairs(num_experts, max_expert_parallel)
    if pairs > most:
        raise CheckpointError(
            f"--compression {compression:g} needs {pairs} pairs, but {max_expert_parallel} ranks of {per_rank} "
            f"experts hold at most {most}; choose a smaller --max-expert-parallel or --compression "
            f"{100 * most / num_experts:.2f}"
        )
    return pairs


def most_pairs(num_experts: int, max_expert_parallel: int) -> int:
    """How many disjoint pairs a layer can have."""
    return max_expert_parallel * (num_experts // max_expert_parallel // 2)


def _round_down(pairs: float) -> int:
    # A product that is a hair below a whole number means that number.
    return int(pairs + 1e-9)


def _split_experts(num_experts: int, max_expert_parallel: int) -> list[range]:
    """The ids of each rank's experts, among which mates are found."""
    size = num_experts // max_expert_parallel
    return [range(start, start + size) for start in range(0, num_experts, size)]


def list_candidates(num_experts: int, max_expert_parallel: int) -> list[tuple[int, int]]:
    """Every two experts that may be mates."""
    return [pair for rank in _split_experts(num_experts, max_expert_parallel) for pair in combinations(rank, 2)]


def draw_mates(num_experts: int, max_expert_parallel: int, generator: random.Random) -> list[tuple[int, int]]:
    """As many pairs as there can be, drawn at random within each rank's experts."""
    drawn: list[tuple[int, int]] = []
    for rank in _split_experts(num_experts, max_expert_parallel):
        ids = list(rank)
        generator.shuffle(ids)
        drawn += zip(ids[0::2], ids[1::2], strict=False)
    return drawn


def match_pairs(candidates: Iterable[Mates], pairing: str) -> list[Mates]:
    """As many disjoint pairs as there can be: of least loss together, or of most coactivation.

    By maximum-weight matching. Where coactivation leaves a choice, the smaller loss takes it.
    """
    graph = networkx.Graph()
    by_pair = {frozenset(each.experts): each for each in candidates}
    largest = max((each.loss for each in by_pair.values()), default=0.0) or 1.0
    for each in by_pair.values():
        weight = -each.loss / largest
        if pairing == "coactivation":
            weight = each.coactivation + 1e-6 * weight
        graph.add_edge(*each.experts, weight=weight)
    matching = networkx.max_weight_matching(graph, maxcardinality=True)
    return sorted((by_pair[frozenset(pair)] for pair in matching), key=lambda each: each.experts)


def spend_budget(budget: int, mates_by_layer: Mapping[int, Sequence[Mates]]) -> dict[int, list[Mates]]:
    """The `budget` pairs of least loss over all layers; every pair saves the same bytes."""
    ranked = sorted(
        ((each.loss, layer, each) for layer, mates in mates_by_layer.items() for each in mates),
        key=lambda entry: (entry[0], entry[1], entry[2].experts),
    )
    chosen: dict[int, list[Mates]] = {layer: [] for layer in mates_by_layer}
    for _, layer, each in ranked[:budget]:
        chosen[layer].append(each)
    return chosen


def layer_slots(layer: int, num_experts: int, pairs: Iterable[tuple[int, int]]) -> LayerSlots:
    """Pairs in the order of their ids, then every other expert alone, ascending."""
    mates = sorted(pairs)
    paired = [expert for pair in mates for expert in pair]
    single = sorted(set(range(num_experts)) - set(paired))
    return LayerSlots(layer=layer, experts=paired + single, pairs=len(mates))


def draw_slots(
    layer: int, num_experts: int, pairs: int, max_expert_parallel: int, generator: random.Random
) -> LayerSlots:
    """A layer's slots with mates drawn at random; where not all are paired, who stays single is drawn as well."""
    drawn = draw_mates(num_experts, max_expert_parallel, generator)
    if pairs < len(drawn):
        drawn = generator.sample(drawn, pairs)
    return layer_slots(layer, num_experts, drawn)
