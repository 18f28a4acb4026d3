"""Merging a layer's pairs, and the words that they become."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_puzzle.format import pack, unpack

from .alignment import align, neuron_magnitudes
from .compensation import compensate
from .correction import OutputCorrection
from .layer import ExpertWeights
from .rules import cheapest, paper_rule
from .statistics import ExpertStatistics, InputNorms

# At once by the rules that decide each element by itself: their temporaries, a dozen of this many, stay in the cache.
_ELEMENTS_PER_BLOCK = 1 << 17


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


Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ElementRule:
    """A rule that decides each element of a pair by itself.

    `importance` is its second argument for gate, up and down, each as two factors, float32: one of rows (2, num_rows or
    1, 1) and one of columns (2, 1, num_columns).
    """

    rule: Rule
    importance: Sequence[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of_the_paper(cls, norms: Sequence[InputNorms], tau: float) -> "ElementRule":
        """`paper_rule` with the members' norms."""
        hidden, intermediate = (torch.stack(parts)[:, None] for parts in zip(*norms, strict=True))
        alike = torch.ones(2, 1, 1, device=hidden.device)
        importance = ((alike, hidden), (alike, hidden), (alike, intermediate))
        return cls(lambda weights, norms: paper_rule(weights, norms, tau), importance)

    @classmethod
    def of_saliency(cls, statistics: Sequence[ExpertStatistics]) -> "ElementRule":
        """What sharing an element or leaving out a member costs; see `cheapest`."""
        hidden, intermediate = (
            torch.stack([getattr(member, name) for member in statistics])[:, None]
            for name in ("hidden", "intermediate")
        )
        gate_rows, up_rows = (rows[..., None] for rows in _rows(statistics))
        alike = torch.ones(2, 1, 1, device=hidden.device)
        return cls(cheapest, ((gate_rows, hidden), (up_rows, hidden), (alike, intermediate)))

    def merge(self, experts: ExpertWeights, pair: tuple[int, int]) -> ExpertWeights:
        """Both members. Returns, as all here, float32 weights of two experts."""
        gate, up, down = (
            torch.cat(list(self._blocks(sources, importance)), dim=1)
            for sources, importance in zip(_sources(experts, pair), self.importance, strict=True)
        )
        return _pair(experts, gate, up, down)

    def pack(
        self, experts: ExpertWeights, pair: tuple[int, int], names: Sequence[str]
    ) -> tuple[list[torch.Tensor], MergeStatistics]:
        """Their words, int16, and what merging changed, without a float32 matrix in memory; `names` are gate's on."""
        packed, statistics = [], MergeStatistics()
        for sources, importance, name in zip(_sources(experts, pair), self.importance, names, strict=True):
            words = torch.empty(sources[0].shape, dtype=torch.int16, device=sources[0].device)
            start = 0
            for merged in self._blocks(sources, importance):
                rows = slice(start, start + merged.shape[1])
                words[rows] = pack_members(list(merged), name)
                statistics.add(compare(words[rows], [source[rows] for source in sources]))
                start = rows.stop
            packed.append(words)
        return packed, statistics

    def _blocks(
        self, sources: Sequence[torch.Tensor], importance: tuple[torch.Tensor, torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        num_rows, num_columns = sources[0].shape
        step = max(1, _ELEMENTS_PER_BLOCK // num_columns)
        by_row, by_column = importance[0].expand(2, num_rows, 1), importance[1]
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            yield self.rule(torch.stack([source[rows].float() for source in sources]), by_row[:, rows] * by_column)


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
    gate, up, down = (torch.stack([source.float() for source in sources]) for sources in _sources(experts, pair))
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


def pack_pair(
    merged: ExpertWeights, experts: ExpertWeights, pair: tuple[int, int], names: Sequence[str]
) -> tuple[list[torch.Tensor], MergeStatistics]:
    """The words, int16, of gate, up and down of `merged`, and what merging changed in `pair` of `experts`."""
    packed, statistics = [], MergeStatistics()
    matrices = zip(merged.matrices(0), merged.matrices(1), strict=True)
    for members, sources, name in zip(matrices, _sources(experts, pair), names, strict=True):
        words = pack_members(members, name)
        statistics.add(compare(words, sources))
        packed.append(words)
    return packed, statistics


def compare(words: torch.Tensor, sources: Sequence[torch.Tensor]) -> MergeStatistics:
    """What merging two matrices changed; `sources` are theirs, in the order of neurons that `words` have."""
    decoded = [unpack(words, member).float() for member in (0, 1)]
    held = [member != 0 for member in decoded]
    return MergeStatistics(
        elements=words.numel(),
        shared=int((held[0] & held[1]).sum()),
        kept=int(held[0].sum() + held[1].sum()),
        squared_error=sum(_squared(a - b.float()) for a, b in zip(decoded, sources, strict=True)),
        squared_weight=sum(_squared(source.float()) for source in sources),
    )


def _squared(matrix: torch.Tensor) -> float:
    # Row by row, so that the sum does not depend on how many threads there are.
    return float(matrix.square().sum(dim=1, dtype=torch.float64).sum())


def _sources(experts: ExpertWeights, pair: tuple[int, int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Gate, up and down of both."""
    first, second = pair
    return zip(experts.matrices(first), experts.matrices(second), strict=True)


def _rows(statistics: Sequence[ExpertStatistics]) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.stack([member.gate_rows for member in statistics]),
        torch.stack([member.up_rows for member in statistics]),
    )


def _pair(experts: ExpertWeights, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> ExpertWeights:
    return ExpertWeights(list(gate), list(up), list(down), experts.activation)
