"""Each element takes the cheapest of sharing and of leaving out one mate.

A weight's cost is the second moment of its input over the expert's own tokens, for gate and up times what the row's
output does to the expert's output. Shared magnitudes are the mean weighted by the costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Mating, Rule

if TYPE_CHECKING:
    from ..pair import Packed


@dataclass(frozen=True)
class _Saliency(Rule):
    def pack(self, mating: Mating) -> Iterator[Packed]:
        from ..pair import ElementRule

        return ElementRule.of_saliency(mating.statistics).pack(mating.experts, mating.pair, mating.names)


SALIENCY = _Saliency("saliency")
