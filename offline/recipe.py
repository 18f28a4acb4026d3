"""What the user chose of how experts are merged."""

from dataclasses import dataclass

RULES = ("paper", "saliency", "compensated")
PAIRINGS = ("random", "loss", "coactivation")


@dataclass(frozen=True)
class Recipe:
    """How mates are found and merged.

    `rule` is one of RULES, `pairing` one of PAIRINGS. `tau` is read by the rule `paper` alone; `align` puts the second
    mate's neurons in the order that merges best.
    """

    rule: str
    align: bool = False
    pairing: str = "random"
    tau: float = 0.4

    @property
    def compensated(self) -> bool:
        return self.rule == "compensated"

    @property
    def as_published(self) -> bool:
        """Whether all of it is the paper's: then every layer has as many pairs, and nothing is estimated."""
        return self.rule == "paper" and self.pairing == "random"
