"""The decisions of `saliency` column by column, with what a column loses pushed into the columns still to come.

As GPTQ (arXiv 2210.17323) and SparseGPT (arXiv 2301.00774) do for one matrix, for each mate with the moments of its own
inputs. Down projections then make up for what gate and up lost and for the layers before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Mating, Rule

if TYPE_CHECKING:
    from ..pair import Packed


@dataclass(frozen=True)
class _Compensated(Rule):
    def pack(self, mating: Mating) -> Iterator[Packed]:
        from ..pair import merge_by_compensation, pack_pair

        assert mating.correction is not None
        merged = merge_by_compensation(mating.experts, mating.pair, mating.statistics, mating.correction)
        return pack_pair(merged, mating.experts, mating.pair, mating.names)


COMPENSATED = _Compensated("compensated", needs_tokens=True, sequential=True, full_moments=True, leaves_traces=False)
