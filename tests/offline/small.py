"""One small MoE layer with tokens: as much of a model as most tests of merging need."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import silu

import vllm_puzzle.offline.merging.merge_layer
from vllm_puzzle.format import LayerSlots, unpack
from vllm_puzzle.offline.merging.layer import ExpertWeights, LayerTokens, RoutedTokens
from vllm_puzzle.offline.merging.pair import MergeStatistics
from vllm_puzzle.offline.merging.recipe import Recipe
from vllm_puzzle.offline.merging.rules import RULES

# Odd multiples, so that a swap of two sizes cannot go unnoticed.
HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOP_K = 24, 20, 6, 2

EVERY_RECIPE = [
    Recipe(rule, align) for rule in RULES.values() for align in (False, True) if rule.can_align or not align
]


def recipe_name(recipe: Recipe) -> str:
    return recipe.rule.name + " aligned" * recipe.align


def small_experts(
    num_experts: int = NUM_EXPERTS,
    hidden_size: int = HIDDEN_SIZE,
    intermediate_size: int = INTERMEDIATE_SIZE,
    activation: Callable[[torch.Tensor], torch.Tensor] = silu,
) -> ExpertWeights:
    """BF16 values, as a checkpoint has them."""
    generator = torch.Generator().manual_seed(11)

    def matrices(*size: int) -> list[torch.Tensor]:
        return [(torch.randn(size, generator=generator) * 0.2).bfloat16() for _ in range(num_experts)]

    shape = (intermediate_size, hidden_size)
    return ExpertWeights(matrices(*shape), matrices(*shape), matrices(*shape[::-1]), activation)


def small_tokens(
    num_tokens: int,
    idle: Sequence[int] = (),
    num_experts: int = NUM_EXPERTS,
    hidden_size: int = HIDDEN_SIZE,
) -> RoutedTokens:
    """Float32 tokens with a mean, of few directions and unequal channels; none goes to the experts in `idle`."""
    generator = torch.Generator().manual_seed(12)
    latent = torch.randn(num_tokens, 5, generator=generator) @ torch.randn(5, hidden_size, generator=generator)
    noise = torch.randn(num_tokens, hidden_size, generator=generator)
    mean = torch.randn(hidden_size, generator=generator)
    hidden = (latent + 0.4 * noise + mean) * torch.linspace(0.2, 2, hidden_size)
    logits = torch.randn(num_tokens, num_experts, generator=generator) + torch.linspace(0.5, -0.5, num_experts)
    logits[:, list(idle)] = -torch.inf
    weights, ids = logits.softmax(dim=1).topk(TOP_K)
    return RoutedTokens(hidden, ids, weights)


@dataclass(frozen=True)
class PackedLayer:
    """`words` are each slot's gate, up and down, in slot order; `experts` what a reader of them finds."""

    words: list[list[torch.Tensor]]
    experts: ExpertWeights
    statistics: MergeStatistics


def merge_layer(
    experts: ExpertWeights,
    slots: LayerSlots,
    recipe: Recipe,
    routed: RoutedTokens | None = None,
    lacking: torch.Tensor | None = None,
) -> PackedLayer:
    """With what it emits gathered and read back."""
    words: list[list[torch.Tensor]] = []
    stored = experts.copy()

    def emit(slot: int, position: int, matrix: torch.Tensor) -> None:
        assert (slot, position) == divmod(sum(map(len, words)), 3)
        if position == 0:
            words.append([])
        words[slot].append(matrix)
        for member, expert in enumerate(slots.members(slot)):
            (stored.gate, stored.up, stored.down)[position][expert] = unpack(matrix, member)

    tokens = None if routed is None else LayerTokens(routed, 1.0, lacking)
    merged = vllm_puzzle.offline.merging.merge_layer.merge_layer(
        experts.matrices, experts.activation, names_of(experts), slots, recipe, emit, tokens
    )
    return PackedLayer(words, stored, merged.statistics)


def names_of(experts: ExpertWeights) -> list[list[str]]:
    return [[f"{expert}.{matrix}" for matrix in ("gate", "up", "down")] for expert in range(experts.num_experts)]


def slots_of(pairs: Sequence[tuple[int, int]], num_experts: int = NUM_EXPERTS) -> LayerSlots:
    paired = [expert for pair in pairs for expert in pair]
    return LayerSlots(layer=0, experts=paired + [e for e in range(num_experts) if e not in paired], pairs=len(pairs))
