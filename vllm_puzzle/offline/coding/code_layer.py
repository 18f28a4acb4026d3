"""Coding the experts of one layer, one after the other."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_puzzle.format import FormatError, LayerCodes, check_codable

from ..merging.changes import WeightChanges, squared
from ..merging.correction import OutputCorrection
from ..merging.layer import Activation, ExpertWeights, LayerTokens
from ..merging.merge_layer import Read
from ..merging.saliency import measure_saliency
from .expert import CodedExpert, code_expert

EmitCoded = Callable[[int, CodedExpert], None]
"""Takes an expert's id, and what it became."""


@dataclass
class CodingStatistics(WeightChanges):
    """Sums over the weights of coded experts, and how many there are."""

    weights: int = 0


def code_layer(
    read: Read,
    activation: Activation,
    names: Sequence[Sequence[str]],
    codes: LayerCodes,
    emit: EmitCoded,
    tokens: LayerTokens | None = None,
) -> CodingStatistics:
    """Codes one expert after the other; only that one is in memory.

    Args:
        read: called once for each expert.
        activation: the experts'.
        names: what an error calls gate, up and down of each expert.
        codes: how wide each expert's codes are.
        emit: called with each expert, in the order of ids, before the next is coded.
        tokens: the calibration tokens at this layer, with what its output lacks; None codes each weight by itself.

    Raises:
        FormatError: a weight that is not finite, by tensor and index, or one that is too large to be weighed.
    """
    experts = ExpertWeights.unread(codes.num_experts, activation)
    routed, correction = None, None
    if tokens is not None:
        routed = tokens.routed
        if tokens.lacking is not None:
            correction = OutputCorrection(experts, routed, tokens.lacking)
    statistics = CodingStatistics()
    for expert in range(codes.num_experts):
        experts.put(expert, read(expert))
        check_codable(experts.matrices(expert), names[expert])
        for weight in _weigh(experts.matrices(expert), names[expert]):
            statistics.squared_weight += weight
        saliency = measure_saliency(experts, expert, routed, full=routed is not None)
        coded = code_expert(experts, expert, (codes.w13_bits[expert], codes.w2_bits[expert]), saliency, correction)
        for matrix, source in zip(coded.matrices(), experts.matrices(expert), strict=True):
            statistics.squared_error += squared(matrix.float() - source.float())
            statistics.weights += source.numel()
        emit(expert, coded)
        experts.drop(expert)
    return statistics


def _weigh(matrices: Sequence[torch.Tensor], names: Sequence[str]) -> list[float]:
    """The sums of squares; raises FormatError for a matrix whose errors could not be summed up."""
    weights = [squared(matrix.float()) for matrix in matrices]
    for matrix, name, weight in zip(matrices, names, weights, strict=True):
        if not math.isfinite(weight):
            largest = float(matrix.abs().max())
            raise FormatError(f"{name} has magnitudes up to {largest:g}, whose squares overflow float32; repair it")
    return weights
