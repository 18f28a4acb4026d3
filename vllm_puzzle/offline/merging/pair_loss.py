"""What two experts are expected to lose as mates, and how often they fire together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .alignment import estimate_loss
from .layer import ExpertWeights, LayerTokens, RoutedTokens
from .saliency import ExpertStatistics, measure_saliency


@dataclass(frozen=True)
class Mates:
    """Two experts of one layer that could share a slot, by id, and what is expected of them.

    `loss` is the squared error that merging them as they are is estimated to add to the layer's output, relative to
    the squared residual stream; `coactivation` is the share of the tokens routed to either that are routed to both.
    """

    experts: tuple[int, int]
    loss: float
    coactivation: float

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Mates":
        """What `dataclasses.asdict` and JSON made a mapping of."""
        return cls(tuple(content["experts"]), content["loss"], content["coactivation"])


def estimate_pairs(experts: ExpertWeights, pairs: Sequence[tuple[int, int]], tokens: LayerTokens | None) -> list[Mates]:
    """What to expect of each of `pairs`, in their order; without tokens every input and row counts alike."""
    routed = None if tokens is None else tokens.routed
    statistics = [measure_saliency(experts, expert, routed, full=False) for expert in range(experts.num_experts)]
    return [estimate_pair(experts, pair, [statistics[expert] for expert in pair], tokens) for pair in pairs]


def estimate_pair(
    experts: ExpertWeights, pair: tuple[int, int], statistics: Sequence[ExpertStatistics], tokens: LayerTokens | None
) -> Mates:
    """What to expect of two experts as mates, given the statistics of both."""
    loss = estimate_loss(experts, pair, statistics)
    if tokens is None:
        return Mates(pair, loss, 0.0)
    return Mates(pair, loss / tokens.energy, _coactivation(tokens.routed, *pair))


def _coactivation(routed: RoutedTokens, first: int, second: int) -> float:
    has_first, has_second = ((routed.topk_ids == expert).any(dim=1) for expert in (first, second))
    either = int((has_first | has_second).sum())
    return int((has_first & has_second).sum()) / either if either else 0.0
