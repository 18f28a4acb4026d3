"""Expert pruning: half of the experts are never chosen again, the others stay as they are."""

import random

from vllm_puzzle.offline.merging.layer import ExpertWeights, RoutedTokens

from .base import CompressedLayer, half, highest, in_float32, own_tokens, token_counts


def reap(experts: ExpertWeights, tokens: RoutedTokens, _: random.Random) -> CompressedLayer:
    """REAP, equation 9 (arXiv 2510.13999): the experts with the least mean of `router weight * ||output||_2` go.

    The mean is over the tokens that were routed to the expert, the router weight is the one the layer multiplies
    with. An expert without tokens has saliency 0.
    """
    wide = in_float32(experts)
    counts = token_counts(tokens, wide.num_experts)
    saliency = [0.0] * wide.num_experts
    for expert, count in enumerate(counts):
        for weights, rows in own_tokens(wide, tokens, expert):
            saliency[expert] += (weights * wide.output(expert, rows).norm(dim=1)).sum().item() / count
    return _keep_highest(experts, saliency)


def drop_least_frequent(experts: ExpertWeights, tokens: RoutedTokens, _: random.Random) -> CompressedLayer:
    """The experts with the fewest tokens go: what REAP and other papers on dropping experts compare with."""
    return _keep_highest(experts, token_counts(tokens, experts.num_experts))


def _keep_highest(experts: ExpertWeights, scores: list[float] | list[int]) -> CompressedLayer:
    kept = highest(scores, half(len(scores)))
    return CompressedLayer(experts, frozenset(range(len(scores))) - frozenset(kept))
