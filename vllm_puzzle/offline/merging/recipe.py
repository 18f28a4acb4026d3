"""What was chosen of how experts are merged."""

from dataclasses import dataclass

from ..defaults import DEFAULT_PAIRING, DEFAULT_TAU
from .rules import Rule

PAIRINGS = ("random", "loss", "coactivation")


@dataclass(frozen=True)
class Recipe:
    """How mates are found and merged.

    `pairing` is one of PAIRINGS; `align` puts the second mate's neurons in the order that merges best; `tau` is for the
    rules that read it.
    """

    rule: Rule
    align: bool = False
    pairing: str = DEFAULT_PAIRING
    tau: float = DEFAULT_TAU

    def chooses(self, all_paired: bool) -> bool:
        """Whether it takes estimates to know the pairs: not where all are drawn, nor where every layer has as many.

        `all_paired` says whether no expert stays alone that could have a mate.
        """
        return self.pairing != "random" or not (all_paired or self.rule.pairs_evenly)
