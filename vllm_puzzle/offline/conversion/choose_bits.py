"""Choosing, before anything is coded, how wide the codes of each expert are."""

from collections.abc import Callable

import torch

from vllm_puzzle.format import LayerCodes

from ..coding.budget import expert_bytes, hardly_seen, spend_bits
from ..coding.losses import estimate_coding_losses
from ..merging.layer import ExpertWeights, LayerTokens
from ..merging.saliency import measure_saliency
from .calibration_walk import survey_layers
from .job import Setup


@torch.inference_mode()
def choose_bits(
    setup: Setup, bits: float, even: bool, advance: Callable[[int], None]
) -> tuple[dict[int, LayerCodes], dict[int, float]]:
    """The codes that are estimated to cost least over all layers, for the bytes that `bits` a weight take.

    Runs the calibration tokens through the source model; without them every input and row counts alike.

    Args:
        even: the experts of a layer have codes of one width.
        advance: told of each layer that is done.

    Returns:
        The codes of every MoE layer, and what each is expected to lose.

    Raises:
        CheckpointError: a layer does not fit transformers' own model, or an element cannot be stored.
    """
    losses: dict[int, list[dict[int, float]]] = {}
    rare: dict[int, list[int]] = {}
    for layer, experts, tokens in survey_layers(setup, advance):
        losses[layer] = [_estimate(experts, expert, tokens) for expert in range(experts.num_experts)]
        if tokens is not None:
            rare[layer] = hardly_seen(tokens.routed, experts.num_experts)
    sizes = expert_bytes(setup.shape.hidden_size, setup.shape.intermediate_size)
    codes = spend_bits(losses, bits, sizes, even, rare)
    lost = {
        layer: sum(each[width] for each, width in zip(losses[layer], chosen.w13_bits, strict=True))
        for layer, chosen in codes.items()
    }
    return codes, lost


def _estimate(experts: ExpertWeights, expert: int, tokens: LayerTokens | None) -> dict[int, float]:
    routed = None if tokens is None else tokens.routed
    # Of each input with itself: between them would take as long as coding does.
    statistics = measure_saliency(experts, expert, routed, full=False)
    return estimate_coding_losses(experts, expert, statistics, tokens)
