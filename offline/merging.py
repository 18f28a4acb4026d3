"""Merging a layer's pairs, and the words that they become."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_puzzle.format import pack, unpack

from .alignment import align, neuron_magnitudes
from .compensation import compensate
from .correction import OutputCorrection
from .layer import ExpertWeights
from .rules import cheapest, paper_rule
from .statistics import ExpertStatistics, InputNorms

# Bounds the float32 temporaries of the rules that decide each element by itself, which need about eight of this many.
_ELEMENTS_PER_BLOCK = 1 << 22


@dataclass
class MergeStatistics:
    """Sums over the elements of merged pairs; an element of a pair counts once, a weight once per member."""

    elements: int = 0
    shared: int = 0
    kept: int = 0
    squared_error: float = 0.0
    squared_weight: float = 0.0

    def add(self, other: "MergeStatistics") -> None:
        self.elements += other.elements
        self.shared += other.shared
        self.kept += other.kept
        self.squared_error += other.squared_error
        self.squared_weight += other.squared_weight

    @property
    def shared_fraction(self) -> float:
        """Elements that both members keep."""
        return self.shared / self.elements if self.elements else 0.0

    @property
    def kept_fraction(self) -> float:
        """Weights that survive in their own expert."""
        return self.kept / (2 * self.elements) if self.elements else 1.0

    @property
    def relative_error(self) -> float:
        """`||W' - W||^2 / ||W||^2` over both members."""
        return self.squared_error / self.squared_weight if self.squared_weight else 0.0


def merge_as_the_paper(
    experts: ExpertWeights, pair: tuple[int, int], norms: Sequence[InputNorms], tau: float
) -> ExpertWeights:
    """Both members by `paper_rule`; `norms` are theirs. Returns, as all here, float32 weights of two experts."""
    hidden, intermediate = (torch.stack(parts)[:, None] for parts in zip(*norms, strict=True))

    def rule(weights: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        return paper_rule(weights, norms, tau)

    gate, up, down = _stacked(experts, pair)
    return _pair(experts, _by_rows(rule, gate, hidden), _by_rows(rule, up, hidden), _by_rows(rule, down, intermediate))


def merge_by_saliency(
    experts: ExpertWeights, pair: tuple[int, int], statistics: Sequence[ExpertStatistics]
) -> ExpertWeights:
    """Each element by what sharing it or leaving out a member costs; see `cheapest`."""
    gate, up, down = _stacked(experts, pair)
    hidden, intermediate = (
        torch.stack([getattr(member, name) for member in statistics])[:, None] for name in ("hidden", "intermediate")
    )
    gate_rows, up_rows = _rows(statistics)
    return _pair(
        experts,
        _by_rows(cheapest, gate, gate_rows[..., None] * hidden),
        _by_rows(cheapest, up, up_rows[..., None] * hidden),
        _by_rows(cheapest, down, intermediate),
    )


def merge_by_compensation(
    experts: ExpertWeights,
    pair: tuple[int, int],
    statistics: Sequence[ExpertStatistics],
    correction: OutputCorrection,
) -> ExpertWeights:
    """Column by column, gate and up first; then down, which makes up for what they lost and for the layers before.

    Args:
        statistics: with moments between inputs.
    """
    gate, up, down = _stacked(experts, pair)
    # Gate and up read the same inputs, so one pass over the columns decides both.
    both = compensate(
        torch.cat([gate, up], dim=1),
        torch.stack([member.hidden for member in statistics]),
        torch.cat(_rows(statistics), dim=1),
    )
    merged = _pair(experts, both[:, : gate.shape[1]], both[:, gate.shape[1] :], down)
    asked = [correction.ask(expert, merged, member, statistics[member]) for member, expert in enumerate(pair)]
    targets, moments = (torch.stack(parts) for parts in zip(*asked, strict=True))
    merged.down = list(compensate(targets, moments, torch.ones(targets.shape[:2], device=targets.device)))
    for member, expert in enumerate(pair):
        correction.settle(expert, merged, member)
    return merged


def align_mates(
    experts: ExpertWeights, pair: tuple[int, int], statistics: Sequence[ExpertStatistics]
) -> tuple[ExpertStatistics, ExpertStatistics]:
    """Puts the second expert's neurons in the order that merges best; answers the statistics in that order."""
    first, second = pair
    order = align((neuron_magnitudes(experts, first), neuron_magnitudes(experts, second)), statistics)
    experts.gate[second] = experts.gate[second][order]
    experts.up[second] = experts.up[second][order]
    experts.down[second] = experts.down[second][:, order]
    return statistics[0], statistics[1].permuted(order)


def pack_members(members: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    """The words, int16 (rows, columns), of one matrix of one expert alone or of two that were merged."""
    held = torch.stack(list(members))
    return pack(held.abs().amax(dim=0), [member != 0 for member in held], [torch.signbit(m) for m in held], name=name)


def compare(words: torch.Tensor, sources: Sequence[torch.Tensor]) -> MergeStatistics:
    """What merging two matrices changed; `sources` are theirs, in the order of neurons that `words` have."""
    decoded = [unpack(words, member).float() for member in (0, 1)]
    held = [member != 0 for member in decoded]
    return MergeStatistics(
        elements=words.numel(),
        shared=int((held[0] & held[1]).sum()),
        kept=int(held[0].sum() + held[1].sum()),
        squared_error=sum(
            float((a - b.float()).square().sum(dtype=torch.float64)) for a, b in zip(decoded, sources, strict=True)
        ),
        squared_weight=sum(float(source.float().square().sum(dtype=torch.float64)) for source in sources),
    )


def _stacked(experts: ExpertWeights, pair: tuple[int, int]) -> list[torch.Tensor]:
    """Gate, up and down of both, float32 (2, rows, columns) each."""
    return [
        torch.stack([matrices[expert].float() for expert in pair])
        for matrices in (experts.gate, experts.up, experts.down)
    ]


def _rows(statistics: Sequence[ExpertStatistics]) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.stack([member.gate_rows for member in statistics]),
        torch.stack([member.up_rows for member in statistics]),
    )


def _pair(experts: ExpertWeights, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> ExpertWeights:
    return ExpertWeights(list(gate), list(up), list(down), experts.activation)


def _by_rows(
    rule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], weights: torch.Tensor, importance: torch.Tensor
) -> torch.Tensor:
    step = max(1, _ELEMENTS_PER_BLOCK // weights.shape[2])
    blocks = zip(weights.split(step, dim=1), importance.expand_as(weights).split(step, dim=1), strict=True)
    return torch.cat([rule(*block) for block in blocks], dim=1)
