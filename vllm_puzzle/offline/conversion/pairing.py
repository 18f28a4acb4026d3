"""Choosing which experts become mates, and which pairs are worth their bytes."""

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import networkx

from vllm_puzzle.format import LayerSlots

from ..errors import CheckpointError
from ..merging.pair_loss import Mates


def count_pairs(num_experts: int, compression: float, max_expert_parallel: int) -> int:
    """How many pairs bring `compression` percent, rounded down to a whole pair.

    An odd number of experts leaves one single, so 50 % means as many pairs as there can be.

    Raises:
        CheckpointError: the blocks are uneven, or have too few experts each for that many pairs.
    """
    block, rest = divmod(num_experts, max_expert_parallel)
    if rest or block < 2:
        raise CheckpointError(
            f"--max-expert-parallel {max_expert_parallel} does not cut {num_experts} experts into equal blocks of "
            f"2 or more; choose a divisor of {num_experts}"
        )
    pairs = pair_budget(num_experts, 1, compression)
    most = most_pairs(num_experts, max_expert_parallel)
    if pairs > most:
        raise CheckpointError(
            f"--compression {compression:g} needs {pairs} pairs, but {max_expert_parallel} blocks of {block} experts "
            f"hold at most {most}; choose a smaller --max-expert-parallel or --compression "
            f"{100 * most / num_experts:.2f}"
        )
    return pairs


def most_pairs(num_experts: int, max_expert_parallel: int) -> int:
    """How many disjoint pairs a layer can have."""
    return max_expert_parallel * (num_experts // max_expert_parallel // 2)


def pair_budget(num_experts: int, num_layers: int, compression: float) -> int:
    """How many pairs in all layers together bring `compression` percent, rounded down to a whole pair."""
    return int(num_experts * num_layers * compression / 100 + 1e-9)


def blocks(num_experts: int, max_expert_parallel: int) -> list[range]:
    """The ids that stay on one rank, and so the ids among which mates are found."""
    size = num_experts // max_expert_parallel
    return [range(start, start + size) for start in range(0, num_experts, size)]


def candidates(num_experts: int, max_expert_parallel: int) -> list[tuple[int, int]]:
    """Every two experts that may be mates."""
    return [pair for block in blocks(num_experts, max_expert_parallel) for pair in combinations(block, 2)]


def draw_mates(num_experts: int, max_expert_parallel: int, generator: random.Random) -> list[tuple[int, int]]:
    """As many pairs as there can be, drawn at random inside the blocks."""
    drawn: list[tuple[int, int]] = []
    for block in blocks(num_experts, max_expert_parallel):
        ids = list(block)
        generator.shuffle(ids)
        drawn += zip(ids[0::2], ids[1::2], strict=False)
    return drawn


def match(mates: Iterable[Mates], pairing: str) -> list[Mates]:
    """As many disjoint pairs as there can be: of least loss together, or of most coactivation.

    By maximum-weight matching. Where coactivation leaves a choice, the smaller loss takes it.
    """
    graph = networkx.Graph()
    by_pair = {frozenset(each.experts): each for each in mates}
    largest = max((each.loss for each in by_pair.values()), default=0.0) or 1.0
    for each in by_pair.values():
        weight = -each.loss / largest
        if pairing == "coactivation":
            weight = each.coactivation + 1e-6 * weight
        graph.add_edge(*each.experts, weight=weight)
    matching = networkx.max_weight_matching(graph, maxcardinality=True)
    return sorted((by_pair[frozenset(pair)] for pair in matching), key=lambda each: each.experts)


def spend(budget: int, mates_by_layer: Mapping[int, Sequence[Mates]]) -> dict[int, list[Mates]]:
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


def pair_at_random(
    layer: int, num_experts: int, pairs: int, max_expert_parallel: int, generator: random.Random
) -> LayerSlots:
    """Mates drawn at random inside the blocks; where not all are paired, which ones stay single is drawn as well."""
    drawn = draw_mates(num_experts, max_expert_parallel, generator)
    if pairs < len(drawn):
        drawn = generator.sample(drawn, pairs)
    return layer_slots(layer, num_experts, drawn)
