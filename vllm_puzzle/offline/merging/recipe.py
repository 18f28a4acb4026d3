"""What was chosen of how experts are merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..defaults import DEFAULT_PAIRING, DEFAULT_TAU
from .rules import RULES, Rule

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

    def to_json(self) -> dict[str, Any]:
        return {"rule": self.rule.name, "align": self.align, "pairing": self.pairing, "tau": self.tau}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Recipe":
        return cls(RULES[content["rule"]], content["align"], content["pairing"], content["tau"])
