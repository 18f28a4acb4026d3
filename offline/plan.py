"""Before anything is merged: which experts become mates, and in which layers."""

import random
from collections.abc import Callable, Sequence

import torch

from vllm_puzzle.format import FormatError

from .alignment import estimate_loss, neuron_magnitudes
from .errors import CheckpointError
from .experts import check_storable, layer_experts, layer_names
from .job import Job
from .layer import ExpertWeights, RoutedTokens
from .pairing import Mates, candidates, draw_mates, match, spend
from .statistics import measure, uniform


@torch.inference_mode()
def plan(job: Job, budget: int, advance: Callable[[int], None]) -> dict[int, list[Mates]]:
    """The `budget` pairs whose merging is estimated to cost least, by MoE layer.

    Runs the calibration tokens through the source model; without them every input and row counts alike.

    Args:
        advance: told of each layer that is done.

    Raises:
        CheckpointError: a layer does not fit transformers' own model, or an element no word.
    """
    shape, calibrator = job.shape, job.calibrator
    generator = random.Random(job.seed)
    hidden = calibrator.embed(job.token_ids) if calibrator is not None and job.token_ids is not None else None
    mates: dict[int, list[Mates]] = {}
    for layer in job.decoder_layers:
        moe = layer in shape.moe_layers
        if not moe and calibrator is None:
            advance(layer)
            continue
        tensors = job.checkpoint.read(job.names[layer])
        routed, energy = None, 1.0
        if calibrator is not None and hidden is not None:
            calibrator.load(layer, tensors)
            routed = calibrator.run(hidden)
        if moe:
            experts = layer_experts(shape, layer, tensors, job.activation, job.device)
            try:
                check_storable(experts, layer_names(shape, layer))
            except FormatError as error:
                raise CheckpointError(str(error)) from None
            if routed is not None and hidden is not None:
                hidden.add(routed.through(experts))
                # The next norm divides by the stream, token by token: where it is large an error is small.
                energy = len(routed) / float(hidden.tokens.float().square().sum(dim=1).reciprocal().mean())
            if job.recipe.pairing == "random":
                drawn = draw_mates(shape.num_experts, job.max_expert_parallel, generator)
                mates[layer] = consider(experts, drawn, routed, energy)
            else:
                possible = candidates(shape.num_experts, job.max_expert_parallel)
                mates[layer] = match(consider(experts, possible, routed, energy), job.recipe.pairing)
        advance(layer)
    return spend(budget, mates)


def consider(
    experts: ExpertWeights, pairs: Sequence[tuple[int, int]], routed: RoutedTokens | None, energy: float
) -> list[Mates]:
    """What each of `pairs` is expected to lose, relative to `energy`, and how often both have the same token."""
    ids = range(experts.num_experts)
    statistics = [measure(experts, e, routed, full=False) if routed else uniform(experts, e) for e in ids]
    result = []
    for first, second in pairs:
        magnitudes = neuron_magnitudes(experts, first), neuron_magnitudes(experts, second)
        loss = estimate_loss(magnitudes, (statistics[first], statistics[second]))
        result.append(Mates((first, second), loss / energy, _coactivation(routed, first, second) if routed else 0.0))
    return result


def _coactivation(routed: RoutedTokens, first: int, second: int) -> float:
    has_first, has_second = ((routed.topk_ids == expert).any(dim=1) for expert in (first, second))
    either = int((has_first | has_second).sum())
    return int((has_first & has_second).sum()) / either if either else 0.0
