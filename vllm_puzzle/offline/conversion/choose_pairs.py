"""Choosing, before anything is merged, which experts become mates and in which layers."""

import random
from collections.abc import Callable

import torch

from vllm_puzzle.format import LayerSlots

from ..merging.layer import ExpertWeights, LayerTokens
from ..merging.pair_loss import Mates, estimate_pairs
from ..merging.recipe import Recipe
from .calibration_walk import survey_layers
from .job import Setup
from .pairing import PairBudget, draw_mates, draw_slots, layer_slots, list_candidates, match_pairs, spend_budget


def draw_pairs(setup: Setup, budget: PairBudget) -> dict[int, LayerSlots]:
    """As many pairs in every layer, drawn at random."""
    generator, num_experts = random.Random(setup.options.seed), setup.shape.num_experts
    return {
        layer: draw_slots(layer, num_experts, budget.per_layer, budget.max_expert_parallel, generator)
        for layer in setup.shape.moe_layers
    }


@torch.inference_mode()
def choose_pairs(
    setup: Setup, recipe: Recipe, budget: PairBudget, advance: Callable[[int], None]
) -> tuple[dict[int, LayerSlots], dict[int, list[Mates]]]:
    """The pairs whose merging is estimated to cost least over all layers, as many as the budget has.

    Runs the calibration tokens through the source model; without them every input and row counts alike.

    Args:
        advance: told of each layer that is done.

    Returns:
        The slots of every MoE layer, and what to expect of their pairs.

    Raises:
        CheckpointError: a layer does not fit transformers' own model, or no word holds an element.
    """
    generator = random.Random(setup.options.seed)
    candidates = {
        layer: _choose_mates(recipe, budget, experts, tokens, generator)
        for layer, experts, tokens in survey_layers(setup, advance)
    }
    mates = spend_budget(budget.total, candidates)
    num_experts = setup.shape.num_experts
    slots = {
        layer: layer_slots(layer, num_experts, [each.experts for each in chosen]) for layer, chosen in mates.items()
    }
    return slots, mates


def _choose_mates(
    recipe: Recipe,
    budget: PairBudget,
    experts: ExpertWeights,
    tokens: LayerTokens | None,
    generator: random.Random,
) -> list[Mates]:
    """As many pairs as a layer can have."""
    num_experts, ranks = experts.num_experts, budget.max_expert_parallel
    if recipe.pairing == "random":
        return estimate_pairs(experts, draw_mates(num_experts, ranks, generator), tokens)
    return match_pairs(estimate_pairs(experts, list_candidates(num_experts, ranks), tokens), recipe.pairing)
