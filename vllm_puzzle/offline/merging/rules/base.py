"""The interface of a merging rule.

The command line lists the rules, so importing them imports no torch; what they compute with is imported late.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from vllm_puzzle.format import WordLayout

    from ..correction import OutputCorrection
    from ..layer import ExpertWeights, RoutedTokens
    from ..pair import Packed
    from ..saliency import ExpertStatistics


@dataclass(frozen=True)
class Mating:
    """Two mates, and all that a rule may know of them.

    Attributes:
        experts: the layer's; only the two of `pair` are in memory, the second with its neurons in their final order.
        pair: their ids, member 0 first.
        names: what an error calls the slot's gate, up and down.
        routed: the calibration tokens at this layer, None without calibration.
        statistics: of both, empty for a rule that does not estimate losses.
        correction: what the layer's output lacks, None unless the rule is sequential.
        tau: see `Rule.reads_tau`.
    """

    experts: ExpertWeights
    pair: tuple[int, int]
    names: Sequence[str]
    routed: RoutedTokens | None
    statistics: Sequence[ExpertStatistics]
    correction: OutputCorrection | None
    tau: float


@dataclass(frozen=True)
class Rule(ABC):
    """How two mates are merged into one slot.

    Attributes:
        name: what `--rule` and the provenance call it.
        needs_tokens: it cannot do without calibration.
        sequential: each layer makes up for those before it, so layers are merged one after the other, and the tokens
            take two paths: through the source model and through the merged layers.
        can_align: the second mate's neurons may be reordered before.
        estimates_loss: it measures saliency, from which the loss of a pair is estimated.
        full_moments: it needs the moments between inputs, not only each input's own.
        leaves_traces: unless neurons were reordered, a merged element follows from the two elements at its place in the
            source, see `shared_magnitudes`.
        pairs_evenly: random pairs are spread evenly over the layers, not by a budget.
        reads_tau: it uses `--tau`.
        idle_consequence: what happens to experts that no calibration token reached, as part of a sentence.
    """

    name: str
    needs_tokens: bool = False
    sequential: bool = False
    can_align: bool = True
    estimates_loss: bool = True
    full_moments: bool = False
    leaves_traces: bool = True
    pairs_evenly: bool = False
    reads_tau: bool = False
    idle_consequence: str = "they are weighed as if they had seen one of the layer's"

    @abstractmethod
    def pack(self, mating: Mating) -> Iterator[Packed]:
        """Merges a pair; yields the words of gate, up and down, each with what merging changed.

        Raises:
            FormatError: an element that no word can hold; names tensor and index.
        """

    def shared_magnitudes(
        self, sources: Sequence[torch.Tensor], layout: WordLayout, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the largest magnitude that a shared element can have, float32 in the shape of both sources.

        Args:
            sources: one matrix of each mate, float32; `name` is what an error calls them.
        """
        import torch

        from vllm_puzzle.format import nearest_magnitude

        first, second = (nearest_magnitude(source, layout, name) for source in sources)
        return torch.minimum(first, second), torch.maximum(first, second)
