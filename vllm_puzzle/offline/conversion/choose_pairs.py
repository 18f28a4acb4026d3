"""Before anything is merged: which experts become mates, and in which layers."""

import random
from collections.abc import Callable

import torch

from vllm_puzzle.format import FormatError, check_storable

from ..checkpoints.expert_tensors import layer_experts, layer_names
from ..errors import CheckpointError
from ..merging.pair_loss import Mates, consider
from .job import Job
from .pairing import candidates, draw_mates, match, spend


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
        routed, energy = None, 1.0
        if calibrator is not None and hidden is not None:
            calibrator.load(layer, job.checkpoint.read(job.names_beside_experts(layer)))
            routed = calibrator.run(hidden)
        if moe:
            names = layer_names(shape, layer)
            tensors = job.checkpoint.read(name for matrices in names for name in matrices)
            experts = layer_experts(shape, layer, tensors, job.activation, job.device)
            try:
                for expert, matrices in enumerate(names):
                    check_storable(experts.matrices(expert), matrices)
            except FormatError as error:
                raise CheckpointError(str(error)) from None
            if routed is not None and hidden is not None:
                hidden.add(routed.through(experts))
                hidden.check_finite(layer)
                energy = hidden.energy()
            if job.recipe.pairing == "random":
                drawn = draw_mates(shape.num_experts, job.max_expert_parallel, generator)
                mates[layer] = consider(experts, drawn, routed, energy)
            else:
                possible = candidates(shape.num_experts, job.max_expert_parallel)
                mates[layer] = match(consider(experts, possible, routed, energy), job.recipe.pairing)
        advance(layer)
    return spend(budget, mates)
