"""What two experts are expected to lose as mates, and how often they fire together."""

from collections.abc import Sequence
from dataclasses import dataclass

from .alignment import estimate_loss
from .layer import ExpertWeights, RoutedTokens
from .saliency import ExpertStatistics, measure, uniform


@dataclass(frozen=True)
class Mates:
    """Two experts of one layer that could share a slot, by id, and what is expected of them.

    `loss` is the squared error that merging them as they are is estimated to add to the layer's output, relative to
    the squared residual stream; `coactivation` is the share of the tokens routed to either that are routed to both.
    """

    experts: tuple[int, int]
    loss: float
    coactivation: float


def consider(
    experts: ExpertWeights, pairs: Sequence[tuple[int, int]], routed: RoutedTokens | None, energy: float
) -> list[Mates]:
    """What each of `pairs` is expected to lose, relative to `energy`, and how often both have the same token."""
    ids = range(experts.num_experts)
    statistics = [measure(experts, e, routed, full=False) if routed else uniform(experts, e) for e in ids]
    return [expect(experts, pair, [statistics[expert] for expert in pair], routed, energy) for pair in pairs]


def expect(
    experts: ExpertWeights,
    pair: tuple[int, int],
    statistics: Sequence[ExpertStatistics],
    routed: RoutedTokens | None,
    energy: float,
) -> Mates:
    """The same of one pair; `statistics` are its members'."""
    first, second = pair
    loss = estimate_loss(experts, pair, statistics)
    return Mates(pair, loss / energy, _coactivation(routed, first, second) if routed else 0.0)


def _coactivation(routed: RoutedTokens, first: int, second: int) -> float:
    has_first, has_second = ((routed.topk_ids == expert).any(dim=1) for expert in (first, second))
    either = int((has_first | has_second).sum())
    return int((has_first & has_second).sum()) / either if either else 0.0
