"""PuzzleMoE's own rule (arXiv 2511.04805, section 3).

Magnitudes within `tau` of each other are shared as their mean; of any others the one with the larger `|W| * ||X||`
stays. Mates are drawn at random, as many in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Mating, Rule

if TYPE_CHECKING:
    import torch

    from vllm_puzzle.format import WordLayout

    from ..pair import Packed


@dataclass(frozen=True)
class _Paper(Rule):
    def pack(self, mating: Mating) -> Iterator[Packed]:
        from ..pair import ElementRule
        from ..saliency import input_norms

        norms = [input_norms(mating.experts, expert, mating.routed) for expert in mating.pair]
        return ElementRule.of_the_paper(norms, mating.tau).pack(mating.experts, mating.pair, mating.names)

    def shared_magnitudes(
        self, sources: Sequence[torch.Tensor], layout: WordLayout, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from vllm_puzzle.format import nearest_magnitude

        mean = nearest_magnitude((sources[0].abs() + sources[1].abs()) / 2, layout, name)
        return mean, mean


PAPER = _Paper(
    "paper",
    can_align=False,
    estimates_loss=False,
    pairs_evenly=True,
    reads_tau=True,
    idle_consequence="every element that cannot be shared goes to their mates",
)
