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

    def chooses(self, all_paired: bool) -> bool:
        """Whether it takes estimates to know the pairs: not where all are drawn, nor with the paper's method whole.

        That one gives every layer as many pairs. `all_paired` says whether no expert stays alone that could have a
        mate.
        """
        return self.pairing != "random" or not (all_paired or self.rule == "paper")
