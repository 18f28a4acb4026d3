"""Choosing, before anything is merged, which experts become mates and in which layers."""

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vllm_puzzle.format import FormatError, LayerSlots, check_storable

from ..checkpoints.expert_tensors import layer_experts, layer_names
from ..errors import CheckpointError
from ..merging.layer import ExpertWeights, LayerTokens
from ..merging.pair_loss import Mates, estimate_pairs
from .calibration_walk import CalibrationWalk
from .job import Job
from .pairing import draw_mates, draw_slots, layer_slots, list_candidates, match_pairs, spend_budget


@dataclass(frozen=True)
class ChosenPairs:
    """The slots of every MoE layer, and what to expect of their pairs: no layer's where all were drawn at random."""

    slots: dict[int, LayerSlots]
    mates: dict[int, list[Mates]]

    def to_json(self) -> dict[str, Any]:
        return {
            "slots": [each.model_dump() for each in self.slots.values()],
            "mates": [[layer, [asdict(each) for each in chosen]] for layer, chosen in self.mates.items()],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ChosenPairs":
        slots = [LayerSlots(**each) for each in content["slots"]]
        mates = {layer: [Mates.from_json(each) for each in chosen] for layer, chosen in content["mates"]}
        return cls({each.layer: each for each in slots}, mates)


def draw_pairs(job: Job) -> ChosenPairs:
    """As many pairs in every layer, drawn at random."""
    generator, num_experts = random.Random(job.options.seed), job.shape.num_experts
    slots = {
        layer: draw_slots(layer, num_experts, job.budget.per_layer, job.budget.max_expert_parallel, generator)
        for layer in job.shape.moe_layers
    }
    return ChosenPairs(slots, {})


@torch.inference_mode()
def choose_pairs(job: Job, advance: Callable[[int], None]) -> ChosenPairs:
    """The pairs whose merging is estimated to cost least over all layers, as many as the budget has.

    Runs the calibration tokens through the source model; without them every input and row counts alike.

    Args:
        advance: told of each layer that is done.

    Raises:
        CheckpointError: a layer does not fit transformers' own model, or no word holds an element.
    """
    generator = random.Random(job.options.seed)
    walk = None if job.calibrator is None else CalibrationWalk(job.calibrator)
    mates: dict[int, list[Mates]] = {}
    for layer in job.decoder_layers:
        experts = _read_experts(job, layer) if layer in job.shape.moe_layers else None
        tokens = None if walk is None else walk.enter(layer, experts)
        if experts is not None:
            mates[layer] = _choose_mates(job, experts, tokens, generator)
        advance(layer)
    mates = spend_budget(job.budget.total, mates)
    num_experts = job.shape.num_experts
    slots = {
        layer: layer_slots(layer, num_experts, [each.experts for each in chosen]) for layer, chosen in mates.items()
    }
    return ChosenPairs(slots, mates)


def _read_experts(job: Job, layer: int) -> ExpertWeights:
    names = layer_names(job.shape, layer)
    tensors = job.checkpoint.read(name for matrices in names for name in matrices)
    experts = layer_experts(job.shape, layer, tensors, job.activation, job.device)
    try:
        for expert, matrices in enumerate(names):
            check_storable(experts.matrices(expert), matrices)
    except FormatError as error:
        raise CheckpointError(str(error)) from None
    return experts


def _choose_mates(
    job: Job, experts: ExpertWeights, tokens: LayerTokens | None, generator: random.Random
) -> list[Mates]:
    """As many pairs as a layer can have."""
    num_experts, ranks, pairing = job.shape.num_experts, job.budget.max_expert_parallel, job.recipe.pairing
    if pairing == "random":
        return estimate_pairs(experts, draw_mates(num_experts, ranks, generator), tokens)
    return match_pairs(estimate_pairs(experts, list_candidates(num_experts, ranks), tokens), pairing)
