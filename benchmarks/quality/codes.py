"""Coded experts made layer by layer from the uncompressed model, as the peers are, for comparisons with equal inputs.

What the converter writes is better: it lets each layer make up for those before it.
"""

import random
from collections.abc import Mapping

import torch

from benchmarks.quality.model import QualityModel
from benchmarks.quality.peers import CompressedLayer, LoggedTokens, Method, Peer
from vllm_puzzle.format import CODE_BITS, CodedShape, LayerCodes
from vllm_puzzle.offline.coding.budget import expert_bytes, hardly_seen, spend_bits
from vllm_puzzle.offline.coding.expert import code_expert
from vllm_puzzle.offline.coding.losses import estimate_coding_losses
from vllm_puzzle.offline.merging.layer import ExpertWeights, LayerTokens

_LITTLE = 1e-6


def code_layer_alone(experts: ExpertWeights, tokens: LoggedTokens, codes: LayerCodes) -> CompressedLayer:
    """A layer's experts coded at their widths, each with the moments of its own tokens, and the bits it all takes."""
    intermediate_size, hidden_size = experts.gate[0].shape
    coded = experts.copy()
    num_bytes = 0
    for expert, widths in enumerate(zip(codes.w13_bits, codes.w2_bits, strict=True)):
        made = code_expert(experts, expert, widths, tokens.statistics(experts, expert), None)
        coded.put(expert, made.matrices())
        num_bytes += CodedShape.of_w13(hidden_size, intermediate_size, widths[0]).num_bytes
        num_bytes += CodedShape.of_w2(hidden_size, intermediate_size, widths[1]).num_bytes
    num_weights = 3 * hidden_size * intermediate_size * experts.num_experts
    return CompressedLayer(coded, bits=8 * num_bytes / num_weights)


def _even(width: int) -> Method:
    def method(experts: ExpertWeights, tokens: LoggedTokens, _: random.Random) -> CompressedLayer:
        return code_layer_alone(experts, tokens, LayerCodes.even(0, experts.num_experts, width))

    return method


EVEN_CODES = {
    width: Peer(f"codes, {width / 2:g} bits, layer by layer", None, _even(width), "docs/quality.md")
    for width in CODE_BITS
}
"""Codes of one width everywhere, by that width."""


@torch.inference_mode()
def spend_alone(
    model: QualityModel, logged: Mapping[int, LoggedTokens], bits: float, by_expert: bool
) -> dict[int, CompressedLayer]:
    """Codes as wide as the converter's budget of `bits` a weight makes them, by layer or by expert too."""
    num_experts = model.shape.num_experts
    losses, rare = {}, {}
    for layer, tokens in logged.items():
        experts, entering = model.source(layer), LayerTokens(tokens, tokens.energy)
        losses[layer] = [
            estimate_coding_losses(experts, expert, tokens.statistics(experts, expert), entering)
            for expert in range(num_experts)
        ]
        rare[layer] = hardly_seen(tokens, num_experts)
    # By layer the converter takes a budget only between the widths.
    budget = bits if by_expert else bits - _LITTLE
    sizes = expert_bytes(model.shape.hidden_size, model.shape.intermediate_size)
    layers = spend_bits(losses, budget, sizes, even=not by_expert, rare=rare)
    return {layer: code_layer_alone(model.source(layer), logged[layer], codes) for layer, codes in layers.items()}
