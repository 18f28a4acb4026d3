"""How much time and memory merging pairs takes."""

from ..merging.recipe import Recipe
from .estimate import BOUNDED_TEMPORARIES, SECONDS_PER_COLUMN, Estimate, Speed
from .pairing import PairBudget
from .work import Work


def estimate_merging(recipe: Recipe, budget: PairBudget, work: Work, speed: Speed) -> Estimate:
    """What merging pairs costs; see `Method.estimate`."""
    shape, pairs = work.shape, budget.total
    hidden, inner = shape.hidden_size, shape.intermediate_size
    layers = len(shape.moe_layers)
    expert = work.expert_weights
    weights = shape.num_experts * layers * expert
    routed, through = work.routed, work.through
    products = 2.0 * through
    elements = float(2 * weights)
    columns = 0
    if recipe.chooses(budget.all_paired):
        # Choosing pairs, on statistics of every expert.
        products += through + 2 * 2 * routed * expert / 3
        drawn = 1 if recipe.pairing == "random" else shape.num_experts
        elements += drawn * weights / 2
    share = 2 * pairs / (shape.num_experts * layers)
    if recipe.rule.estimates_loss:
        # Statistics of the mates.
        products += share * 2 * 2 * routed * expert / 3
        elements += share * weights / 2
    if recipe.rule.sequential:
        products += 2 * through + share * 4 * 2 * routed * expert + share * 2 * routed * (hidden**2 + 2 * inner**2)
        # Two factorizations and an inverse per moment, then every column's error into those that follow.
        products += 2 * pairs * (2 * hidden**3 + 3 * inner**3) + 2 * pairs * (2 * inner * hidden**2 + hidden * inner**2)
        columns += pairs * (hidden + inner)
    if recipe.align:
        elements += 3 * hidden * float(inner) ** 2 * pairs
    seconds = products / speed.products + elements / speed.elements + columns * SECONDS_PER_COLUMN
    return Estimate(seconds, _memory(recipe, budget, work), weights)


def _memory(recipe: Recipe, budget: PairBudget, work: Work) -> int:
    hidden, inner, num_tokens = work.shape.hidden_size, work.shape.intermediate_size, work.num_tokens
    expert = work.expert_weights
    tokens = work.token_bytes(paths=2 if recipe.rule.sequential else 1)
    # Choosing pairs reads a whole layer; merging maps two experts of it and makes their words, two bytes for every
    # weight of one expert, and running tokens through it takes less.
    whole = work.layer_bytes if recipe.chooses(budget.all_paired) else 0
    merging = 3 * expert * 2 + BOUNDED_TEMPORARIES
    if recipe.align:
        # Magnitudes and costs of every weight of two experts, and the loss of every neuron with every other.
        merging += 2 * expert * 4 * 2 + inner**2 * 12
    if recipe.rule.sequential:
        # The merged layer; two mates and their moments in several states; what their outputs lose, for which all tokens
        # may have been routed to them.
        merging += work.layer_bytes + 2 * expert * 4 * 6 + 2 * 4 * (hidden**2 + inner**2) * 4
        merging += 2 * num_tokens * hidden * 2
    return tokens + whole + work.jobs * merging
