"""Who gets how many bits: the widths of all experts' codes that lose least within a budget of bytes."""

import heapq
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vllm_puzzle.format import CODE_BITS, CodedShape, LayerCodes

from ..merging.layer import RoutedTokens

# Relative to an even share of the layer's tokens.
_HARDLY_SEEN = 0.25

Losses = Sequence[Mapping[int, float]]
"""What each expert of a layer loses, in the order of ids, by the width of its codes."""


def expert_bytes(hidden_size: int, intermediate_size: int) -> dict[int, int]:
    """What a coded expert takes, with its codebooks and scales, by the width of its codes."""
    kinds = (CodedShape.of_w13, CodedShape.of_w2)
    return {bits: sum(kind(hidden_size, intermediate_size, bits).num_bytes for kind in kinds) for bits in CODE_BITS}


def bytes_at(bits: float, sizes: Mapping[int, int]) -> float:
    """What an expert takes at `bits` bits a weight, 2 to 4: between two widths in proportion."""
    width = 2 * bits
    below = max(each for each in sizes if each <= width)
    above = min(each for each in sizes if each >= width)
    share = (width - below) / (above - below) if above > below else 0.0
    return sizes[below] + share * (sizes[above] - sizes[below])


def hardly_seen(routed: RoutedTokens, num_experts: int) -> list[int]:
    """The experts whose tokens are so few that other text may well use them far more, ascending."""
    counts = routed.topk_ids.flatten().bincount(minlength=num_experts)
    return [expert for expert, seen in enumerate((counts < _HARDLY_SEEN * counts.float().mean()).tolist()) if seen]


def spend_bits(
    losses: Mapping[int, Losses],
    bits: float,
    sizes: Mapping[int, int],
    even: bool,
    rare: Mapping[int, Collection[int]] | None = None,
) -> dict[int, LayerCodes]:
    """The widths that lose least in all, for no more bytes than all experts take at `bits` bits a weight.

    Args:
        losses: by layer.
        bits: 2 to 4.
        sizes: what an expert takes, see `expert_bytes`.
        even: experts of a layer get one width, and all experts of the model the same where there is one of `bits`.
        rare: by layer the experts, see `hardly_seen`, that do not get more than a width less than their layer's mean,
            counted in widths.

    Returns:
        The codes of each layer, gate, up and down of an expert alike.
    """
    widths = sorted(sizes)
    if even and 2 * bits in widths:
        return {layer: LayerCodes.even(layer, len(experts), int(2 * bits)) for layer, experts in losses.items()}
    groups = [
        _Group(layer, ids, [sum(experts[each][width] for each in ids) for width in widths])
        for layer, experts in losses.items()
        for ids in ([list(range(len(experts)))] if even else [[each] for each in range(len(experts))])
    ]
    budget = math.floor(bytes_at(bits, sizes) * sum(len(group.experts) for group in groups))
    floors = [0] * len(groups)
    while True:
        chosen = _exchange(groups, [sizes[width] for width in widths], budget, floors)
        raised = [] if even else list(_starved(groups, chosen, rare or {}))
        if not raised:
            break
        for index, floor in raised:
            floors[index] = floor
    given = {
        (group.layer, each): widths[step] for group, step in zip(groups, chosen, strict=True) for each in group.experts
    }
    result = {}
    for layer, experts in losses.items():
        row = [given[layer, expert] for expert in range(len(experts))]
        result[layer] = LayerCodes(layer=layer, w13_bits=row, w2_bits=list(row))
    return result


@dataclass(frozen=True)
class _Group:
    """Experts of a layer that get one width, and what they lose at each, in the order of widths."""

    layer: int
    experts: list[int]
    losses: list[float]

    def best_step(self, at: int, sizes: Sequence[int]) -> tuple[float, int] | None:
        """The width to go on to from `at`, and the loss that it saves for each byte; None where none saves any."""
        steps = [
            ((self.losses[at] - self.losses[to]) / (len(self.experts) * (sizes[to] - sizes[at])), to)
            for to in range(at + 1, len(sizes))
        ]
        best = max(steps, default=(0.0, at))
        return best if best[0] > 0 else None


def _exchange(groups: Sequence[_Group], sizes: Sequence[int], budget: int, floors: Sequence[int]) -> list[int]:
    """The place of each group's width: from the narrowest on, whatever saves most for a byte and still fits."""
    chosen = list(floors)
    left = budget - sum(len(group.experts) * sizes[at] for group, at in zip(groups, chosen, strict=True))
    heap: list[tuple[float, int, int]] = []

    def offer(index: int, fitting: Sequence[int]) -> None:
        step = groups[index].best_step(chosen[index], fitting)
        if step is not None:
            heapq.heappush(heap, (-step[0], index, step[1]))

    for index in range(len(groups)):
        offer(index, sizes)
    while heap:
        _, index, to = heapq.heappop(heap)
        cost = len(groups[index].experts) * (sizes[to] - sizes[chosen[index]])
        if cost <= left:
            left -= cost
            chosen[index] = to
            offer(index, sizes)
        elif to > chosen[index] + 1:
            # A smaller step may still fit.
            offer(index, sizes[:to])
    return chosen


def _starved(
    groups: Sequence[_Group], chosen: Sequence[int], rare: Mapping[int, Collection[int]]
) -> Iterator[tuple[int, int]]:
    """The groups of rare experts that got too little, and the least place that they should have."""
    for layer, experts in rare.items():
        places = [index for index, group in enumerate(groups) if group.layer == layer]
        floor = math.ceil(sum(chosen[index] for index in places) / len(places)) - 1
        for index in places:
            if groups[index].experts[0] in experts and chosen[index] < floor:
                yield index, floor
