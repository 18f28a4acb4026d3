"""The merging rules, one file each. A new one is a file and its place in `RULES`."""

from .base import Mating, Rule
from .compensated import COMPENSATED
from .paper import PAPER
from .saliency import SALIENCY

RULES = {rule.name: rule for rule in (PAPER, SALIENCY, COMPENSATED)}

BEST_FIRST = (COMPENSATED, SALIENCY)
"""What the converter chooses from by itself: from the rule that loses least to the one that asks for least."""

__all__ = ["BEST_FIRST", "COMPENSATED", "PAPER", "RULES", "SALIENCY", "Mating", "Rule"]
