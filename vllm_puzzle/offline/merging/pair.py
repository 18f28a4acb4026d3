"""Merging two experts, and packing what they become."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_puzzle.format import pack, pack_single, unpack

from .alignment import align_neurons, neuron_magnitudes
from .changes import WeightChanges, squared
from .compensation import compensate_columns
from .correction import OutputCorrection
from .elements import Merged, cheapest, paper_rule
from .layer import ExpertWeights
from .packing import is_compiled, pack_rows
from .saliency import ExpertStatistics, InputNorms

# Elements that a rule for single elements merges at once: its temporaries, a dozen of this many, stay in the cache.
_ELEMENTS_PER_BLOCK = 1 << 17


@dataclass
class MergeStatistics(WeightChanges):
    """Sums over the elements of merged pairs; an element of a pair counts once, a weight once per member."""

    elements: int = 0
    shared: int = 0
    kept: int = 0

    @property
    def shared_fraction(self) -> float:
        """The share of elements that both members keep."""
        return self.shared / self.elements if self.elements else 0.0

    @property
    def kept_fraction(self) -> float:
        """The share of weights that survive in their own expert."""
        return self.kept / (2 * self.elements) if self.elements else 1.0


Packed = tuple[torch.Tensor, MergeStatistics]
"""The words, int16 (rows, columns), of one matrix of a slot, and what merging changed."""


@dataclass(frozen=True)
class ElementRule:
    """A rule that decides each element of a pair by itself: `paper_rule` with `tau`, or `cheapest` where that is None.

    `importance` is the rule's second argument for gate, up and down, each as two factors, float32: one of rows
    (2, num_rows, 1), or None where all count alike, and one of columns (2, 1, num_columns).
    """

    importance: Sequence[tuple[torch.Tensor | None, torch.Tensor]]
    tau: float | None = None

    @classmethod
    def of_the_paper(cls, norms: Sequence[InputNorms], tau: float) -> "ElementRule":
        """`paper_rule` with the members' norms."""
        hidden, intermediate = (torch.stack(parts)[:, None] for parts in zip(*norms, strict=True))
        return cls(((None, hidden), (None, hidden), (None, intermediate)), tau)

    @classmethod
    def of_saliency(cls, statistics: Sequence[ExpertStatistics]) -> "ElementRule":
        """What sharing an element or leaving out a member costs; see `cheapest`."""
        hidden, intermediate = (
            torch.stack([getattr(member, name) for member in statistics])[:, None]
            for name in ("hidden", "intermediate")
        )
        gate_rows, up_rows = (rows[..., None] for rows in _rows(statistics))
        return cls(((gate_rows, hidden), (up_rows, hidden), (None, intermediate)))

    def merge(self, experts: ExpertWeights, pair: tuple[int, int]) -> ExpertWeights:
        """The two merged experts, float32."""
        gate, up, down = (
            torch.cat(
                [self._decide(weights, row, col).signed(weights) for _, weights, row, col in _blocks(sources, *by)],
                dim=1,
            )
            for sources, by in zip(_sources(experts, pair), self.importance, strict=True)
        )
        return _pair(experts, gate, up, down)

    def pack(self, experts: ExpertWeights, pair: tuple[int, int], names: Sequence[str]) -> Iterator[Packed]:
        """The words of gate, up and down, which an error calls `names`; no float32 matrix is in memory as a whole."""
        for sources, by, name in zip(_sources(experts, pair), self.importance, names, strict=True):
            statistics = MergeStatistics()
            words = torch.empty(sources[0].shape, dtype=torch.int16, device=sources[0].device)
            for rows, weights, by_row, by_column in _blocks(sources, *by):
                statistics.add(self._pack_rows(weights, by_row, by_column, words[rows], name))
            yield words, statistics

    def _pack_rows(
        self,
        weights: torch.Tensor,
        by_row: torch.Tensor | None,
        by_column: torch.Tensor,
        words: torch.Tensor,
        name: str,
    ) -> MergeStatistics:
        if words.device.type == "cpu" and is_compiled():
            sums = pack_rows(weights.float(), by_row, by_column, self.tau, words)
            if not sums.refused:
                return MergeStatistics(sums.squared_error, sums.squared_weight, words.numel(), sums.shared, sums.kept)
        # What was refused is refused once more here, by a sentence.
        two = self._decide(weights, by_row, by_column)
        words.copy_(pack(two.magnitude, two.held, list(torch.signbit(weights)), name=name))
        return count_changes(words, list(weights))

    def _decide(self, weights: torch.Tensor, by_row: torch.Tensor | None, by_column: torch.Tensor) -> Merged:
        magnitudes = weights.abs().float()
        importance = by_column if by_row is None else by_row * by_column
        return cheapest(magnitudes, importance) if self.tau is None else paper_rule(magnitudes, importance, self.tau)


def merge_by_compensation(
    experts: ExpertWeights,
    pair: tuple[int, int],
    statistics: Sequence[ExpertStatistics],
    correction: OutputCorrection,
) -> ExpertWeights:
    """Merges two experts column by column: gate and up, then down, which makes up for their loss and the layers before.

    Args:
        statistics: with moments between inputs.
    """
    gate, up, down = (torch.stack([source.float() for source in sources]) for sources in _sources(experts, pair))
    # Gate and up read the same inputs, so one pass over the columns decides both.
    both = compensate_columns(
        torch.cat([gate, up], dim=1),
        torch.stack([member.hidden for member in statistics]),
        torch.cat(_rows(statistics), dim=1),
    )
    merged = _pair(experts, both[:, : gate.shape[1]], both[:, gate.shape[1] :], down)
    asked = [correction.ask(expert, merged, member, statistics[member]) for member, expert in enumerate(pair)]
    targets, moments = (torch.stack(parts) for parts in zip(*asked, strict=True))
    merged.down = list(compensate_columns(targets, moments, torch.ones(targets.shape[:2], device=targets.device)))
    for member, expert in enumerate(pair):
        correction.settle(expert, merged, member)
    return merged


def align_mates(
    experts: ExpertWeights, pair: tuple[int, int], statistics: Sequence[ExpertStatistics]
) -> tuple[ExpertStatistics, ExpertStatistics]:
    """Puts the second expert's neurons in the order that merges best; returns the statistics in that order."""
    first, second = pair
    order = align_neurons((neuron_magnitudes(experts, first), neuron_magnitudes(experts, second)), statistics)
    experts.gate[second] = experts.gate[second][order]
    experts.up[second] = experts.up[second][order]
    experts.down[second] = experts.down[second][:, order]
    return statistics[0], statistics[1].permuted(order)


def pack_alone(experts: ExpertWeights, expert: int, names: Sequence[str]) -> Iterator[Packed]:
    """The words of gate, up and down of an expert without a mate, which merging does not change."""
    for matrix, name in zip(experts.matrices(expert), names, strict=True):
        words = torch.empty(matrix.shape, dtype=torch.int16, device=matrix.device)
        for rows in _row_blocks(matrix):
            words[rows] = pack_single(matrix[rows], name=name)
        yield words, MergeStatistics()


def pack_members(members: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    """The words, int16 (rows, columns), of one matrix of two experts that were merged."""
    held = torch.stack(list(members))
    return pack(held.abs().amax(dim=0), [member != 0 for member in held], [torch.signbit(m) for m in held], name=name)


def pack_pair(
    merged: ExpertWeights, experts: ExpertWeights, pair: tuple[int, int], names: Sequence[str]
) -> Iterator[Packed]:
    """The words of gate, up and down of `merged`, which `pair` of `experts` became."""
    matrices = zip(merged.matrices(0), merged.matrices(1), strict=True)
    for members, sources, name in zip(matrices, _sources(experts, pair), names, strict=True):
        words = pack_members(members, name)
        yield words, count_changes(words, sources)


def count_changes(words: torch.Tensor, sources: Sequence[torch.Tensor]) -> MergeStatistics:
    """What merging two matrices changed; `sources` are theirs, in the order of neurons that `words` have."""
    statistics = MergeStatistics(elements=words.numel())
    held = []
    for member, source in enumerate(sources):
        weights, merged = source.float(), unpack(words, member).float()
        held.append(merged.bool())
        statistics.kept += int(held[member].count_nonzero())
        statistics.squared_weight += squared(weights)
        statistics.squared_error += squared(weights - merged)
    statistics.shared = int((held[0] & held[1]).count_nonzero())
    return statistics


def _blocks(
    sources: Sequence[torch.Tensor], by_row: torch.Tensor | None, by_column: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """Blocks of rows: their slice, both members' weights (2, rows, columns), and the factors of their importance."""
    for rows in _row_blocks(sources[0]):
        weights = torch.stack([source[rows] for source in sources])
        yield rows, weights, None if by_row is None else by_row[:, rows], by_column


def _row_blocks(matrix: torch.Tensor) -> Iterator[slice]:
    num_rows, num_columns = matrix.shape
    step = max(1, _ELEMENTS_PER_BLOCK // num_columns)
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def _sources(experts: ExpertWeights, pair: tuple[int, int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The matrices of both experts: gate, up and down."""
    first, second = pair
    return zip(experts.matrices(first), experts.matrices(second), strict=True)


def _rows(statistics: Sequence[ExpertStatistics]) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.stack([member.gate_rows for member in statistics]),
        torch.stack([member.up_rows for member in statistics]),
    )


def _pair(experts: ExpertWeights, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> ExpertWeights:
    return ExpertWeights(list(gate), list(up), list(down), experts.activation)
