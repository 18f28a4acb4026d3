"""Merging two experts' matrices element by element."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_puzzle.format import WORD16, nearest_magnitude, pack, unpack

# Bounds the float32 temporaries; a merge needs about eight of this many elements.
_ELEMENTS_PER_BLOCK = 1 << 22


@dataclass(frozen=True)
class Merge:
    """One shared magnitude (float32) and, per member, whether it has the element (bool), all of one shape."""

    magnitude: torch.Tensor
    masks: tuple[torch.Tensor, torch.Tensor]


Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], Merge]


def paper_rule(
    magnitude_i: torch.Tensor,
    magnitude_j: torch.Tensor,
    norm_i: torch.Tensor,
    norm_j: torch.Tensor,
    tau: float,
) -> Merge:
    """The rule of PuzzleMoE, section 3 (arXiv 2511.04805).

    Elements whose magnitudes differ relatively by at most `tau` are shared as their mean; of any other pair the
    element with the larger saliency `|W| * ||X||` stays, member i on a tie.

    Args:
        magnitude_i, magnitude_j: `|W|`, float32 (rows, columns).
        norm_i, norm_j: L2 norm of each input channel over the expert's calibration tokens, float32 (columns,).
        tau: the largest relative difference that counts as similar.
    """
    total = magnitude_i + magnitude_j
    # Two zeros give NaN, which is not similar; the magnitude that is then kept is zero all the same.
    similar = (magnitude_i - magnitude_j).abs() / total <= tau
    salient_i = magnitude_i * norm_i >= magnitude_j * norm_j
    exclusive = torch.where(salient_i, magnitude_i, magnitude_j)
    return Merge(torch.where(similar, total / 2, exclusive), (salient_i | similar, ~salient_i | similar))


RULES: dict[str, Rule] = {"paper": paper_rule}


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


def merge_pair(
    weights: tuple[torch.Tensor, torch.Tensor],
    norms: tuple[torch.Tensor, torch.Tensor],
    rule: Rule,
    tau: float,
    names: tuple[str, str],
) -> tuple[torch.Tensor, MergeStatistics]:
    """Merges and packs one matrix of two mates.

    Args:
        weights: two floating tensors (rows, columns).
        norms: per member the input norms, float32 (columns,).
        names: what an error message calls the two tensors.

    Returns:
        The words, int16 (rows, columns), and what the merge did.

    Raises:
        FormatError: an element that the format cannot hold; names its tensor and index.
    """
    for weight, name in zip(weights, names, strict=True):
        _check_storable(weight, name)
    rows, columns = weights[0].shape
    words = torch.empty(rows, columns, dtype=WORD16.dtype)
    statistics = MergeStatistics()
    step = max(1, _ELEMENTS_PER_BLOCK // columns)
    for start in range(0, rows, step):
        block = slice(start, start + step)
        sources = [weight[block].float() for weight in weights]
        merged = rule(sources[0].abs(), sources[1].abs(), norms[0], norms[1], tau)
        words[block] = pack(merged.magnitude, merged.masks, [torch.signbit(source) for source in sources])
        statistics.add(_statistics(words[block], sources))
    return words, statistics


def _check_storable(weight: torch.Tensor, name: str) -> None:
    """Raises FormatError for an element that no packed word can hold.

    Left to `pack`, such an element could hide behind its mate's, or be reported at a place in the merged block.
    """
    low, high = torch.aminmax(weight)
    if not max(-low.item(), high.item()) <= WORD16.largest:
        nearest_magnitude(weight, name=name)


def _statistics(words: torch.Tensor, sources: list[torch.Tensor]) -> MergeStatistics:
    decoded = [unpack(words, member).float() for member in (0, 1)]
    held = [member != 0 for member in decoded]
    return MergeStatistics(
        elements=words.numel(),
        shared=int((held[0] & held[1]).sum()),
        kept=int(held[0].sum() + held[1].sum()),
        squared_error=sum(
            float((a - b).square().sum(dtype=torch.float64)) for a, b in zip(decoded, sources, strict=True)
        ),
        squared_weight=sum(float(source.square().sum(dtype=torch.float64)) for source in sources),
    )
