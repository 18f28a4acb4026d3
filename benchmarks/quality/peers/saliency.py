"""PuzzleMoE's own ablations: its rule where the saliency that decides is not that of the inputs.

The pairs are the packed format's, so both take the same bytes as every packed row.
"""

import random
from collections.abc import Callable

import torch

from vllm_puzzle.format import default_max_expert_parallel
from vllm_puzzle.offline.conversion.pairing import draw_mates
from vllm_puzzle.offline.defaults import DEFAULT_TAU
from vllm_puzzle.offline.merging.elements import paper_rule
from vllm_puzzle.offline.merging.layer import ExpertWeights, RoutedTokens

from .base import CompressedLayer, in_float32


def magnitude_saliency(experts: ExpertWeights, tokens: RoutedTokens, rng: random.Random) -> CompressedLayer:
    """The larger weight stays (arXiv 2511.04805, section 3, with `|W|` for `|W| * ||X||`)."""
    return _merge(experts, rng, torch.ones_like)


def random_saliency(experts: ExpertWeights, tokens: RoutedTokens, rng: random.Random) -> CompressedLayer:
    """Which of two unlike weights stays is drawn."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))

    def draw(weights: torch.Tensor) -> torch.Tensor:
        tiny = torch.finfo(torch.float32).tiny
        return torch.rand(weights.shape, generator=generator) / weights.abs().clamp(min=tiny)

    return _merge(experts, rng, draw)


def _merge(
    experts: ExpertWeights, rng: random.Random, norms: Callable[[torch.Tensor], torch.Tensor]
) -> CompressedLayer:
    merged = in_float32(experts)
    for first, second in draw_mates(experts.num_experts, default_max_expert_parallel(experts.num_experts), rng):
        for matrices in (merged.gate, merged.up, merged.down):
            weights = torch.stack([matrices[first], matrices[second]])
            merged_pair = paper_rule(weights.abs(), norms(weights), DEFAULT_TAU).signed(weights)
            matrices[first], matrices[second] = merged_pair
    return CompressedLayer(merged)
