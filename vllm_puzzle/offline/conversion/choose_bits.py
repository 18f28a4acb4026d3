"""Choosing, before anything is coded, how wide the codes of each expert are."""

from collections.abc import Callable

import torch

from vllm_puzzle.format import LayerCodes

from .job import Setup


@torch.inference_mode()
def choose_bits(
    setup: Setup, bits: float, even: bool, advance: Callable[[int], None]
) -> tuple[dict[int, LayerCodes], dict[int, float]]:
    """The codes that are estimated to cost least over all layers, `bits` a weight on average.

    Runs the calibration tokens through the source model; without them every input and row counts alike.

    Args:
        even: the experts of a layer have codes of one width.
        advance: told of each layer that is done.

    Returns:
        The codes of every MoE layer, and what each is expected to lose.

    Raises:
        CheckpointError: a layer does not fit transformers' own model, or an element is not finite.
    """
    raise NotImplementedError
