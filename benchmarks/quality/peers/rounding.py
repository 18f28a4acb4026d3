"""Round to nearest: fewer bits for every weight, all weights and experts stay."""

import random
from collections.abc import Callable

import torch

from benchmarks.quality.round_to_nearest import round_to_fp8, round_to_int4
from vllm_puzzle.offline.merging.layer import ExpertWeights, RoutedTokens

from .base import CompressedLayer


def fp8(experts: ExpertWeights, _tokens: RoutedTokens, _: random.Random) -> CompressedLayer:
    """e4m3 with a scale per output row, back in bfloat16."""
    return _rounded(experts, round_to_fp8)


def int4(experts: ExpertWeights, _tokens: RoutedTokens, _: random.Random) -> CompressedLayer:
    """Symmetric integers with a scale per 128 input channels, back in bfloat16."""
    return _rounded(experts, round_to_int4)


def _rounded(experts: ExpertWeights, rounding: Callable[[torch.Tensor], torch.Tensor]) -> CompressedLayer:
    gate, up, down = ([rounding(weight) for weight in weights] for weights in (experts.gate, experts.up, experts.down))
    return CompressedLayer(ExpertWeights(gate, up, down, experts.activation))
