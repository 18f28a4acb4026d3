"""The conversion: a source checkpoint in, a packed checkpoint out, one decoder layer in memory at a time."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.activations import ACT2FN

import vllm_puzzle
from vllm_puzzle.format import (
    Provenance,
    PuzzleMoEQuantizationConfig,
    default_max_expert_parallel,
    parse_packed_name,
)

from .calibration import Calibrator, read_calibration
from .checkpoint import Checkpoint, SourceHash
from .estimate import Work, estimate, measure_speed
from .experts import check_experts, expected_experts
from .families import MoEShape
from .job import Job, names_by_layer
from .mates import Mates
from .merging import MergeStatistics
from .merging_pass import LayerReport, MergingPass
from .model_card import ConvertResult, ModelCard, write_model_card
from .options import ConvertOptions, choose_recipe
from .pairing import count_pairs, layer_slots, most_pairs, pair_at_random
from .plan import plan
from .recipe import Recipe
from .source import SourceCheckpoint
from .writer import check_destination, new_checkpoint

Report = Callable[[str], None]
"""Takes one sentence for the user."""

Progress = Callable[[int, int], None]
"""Takes how many bytes were dealt with since the last call, and how many there are in all."""


def convert(
    source: Path, destination: Path, options: ConvertOptions, report: Report, progress: Progress
) -> ConvertResult:
    """Writes `destination`, a packed checkpoint of `source`.

    Raises:
        CheckpointError: an option, the source or the destination is at fault; nothing was written under that name.
    """
    checkpoint = SourceCheckpoint(source)
    config, shape = checkpoint.config, checkpoint.shape
    check_experts(checkpoint, shape)
    device = options.torch_device()
    max_expert_parallel = options.max_expert_parallel or default_max_expert_parallel(shape.num_experts)
    pairs = count_pairs(shape.num_experts, options.compression, max_expert_parallel)
    all_paired = pairs == most_pairs(shape.num_experts, max_expert_parallel)
    check_destination(destination, checkpoint.plain_bytes)
    token_ids, calibration, calibrator = None, None, None
    if options.calibration is None:
        report("no calibration text was given: experts are weighed by the magnitude of their weights alone")
    else:
        token_ids, calibration = read_calibration(
            options.calibration, checkpoint, config, options.calibration_sequences
        )
        calibrator = Calibrator(checkpoint, config, shape, device)
    names = names_by_layer(checkpoint, shape)
    num_tokens = 0 if token_ids is None else token_ids.numel()
    job = Job(
        checkpoint,
        names,
        shape,
        ACT2FN[config.hidden_act],
        device,
        calibrator,
        token_ids,
        max_expert_parallel,
        _choose_recipe(options, checkpoint, config, names, shape, device, num_tokens, all_paired, report),
        options.seed,
    )
    sizes = {layer: sum(checkpoint.tensors[name].num_bytes for name in group) for layer, group in names.items()}
    chooses = job.recipe.chooses(all_paired)
    planned = sum(sizes[layer] for layer in job.decoder_layers) if chooses else 0

    def advance(layer: int | None) -> None:
        progress(sizes[layer], checkpoint.num_bytes + planned)

    mates: dict[int, list[Mates]] = {}
    if chooses:
        budget = int(shape.num_experts * len(shape.moe_layers) * options.compression / 100 + 1e-9)
        mates = plan(job, budget, advance)
        report(_describe_mates(job, list(mates.values())))
        slots = {
            layer: layer_slots(layer, shape.num_experts, [each.experts for each in chosen])
            for layer, chosen in mates.items()
        }
    else:
        generator = random.Random(options.seed)
        slots = {
            layer: pair_at_random(layer, shape.num_experts, pairs, max_expert_parallel, generator)
            for layer in shape.moe_layers
        }
    source_hash = SourceHash()
    reports: list[LayerReport] = []
    expert_bytes_after = 0
    merging = MergingPass(job)
    with new_checkpoint(destination, len(names)) as writer:
        for layer, group in names.items():
            tensors = checkpoint.read(group)
            for name, tensor in tensors.items():
                source_hash.add(name, tensor)
            if layer is not None:
                merged = merging.layer(layer, tensors, slots.get(layer))
                if merged is not None:
                    reports.append(replace(merged, mates=mates[layer]) if chooses else merged)
            writer.add_shard(tensors)
            expert_bytes_after += sum(tensor.nbytes for name, tensor in tensors.items() if parse_packed_name(name))
            advance(layer)
        if not chooses and job.recipe.rule != "paper":
            report(_describe_mates(job, [layer_report.mates for layer_report in reports]))
        for idle in merging.idle_experts:
            report(idle)
        writer.add_index()
        quantization = PuzzleMoEQuantizationConfig(
            num_experts=shape.num_experts,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            max_expert_parallel=max_expert_parallel,
            layers=list(slots.values()),
            provenance=Provenance(
                rule=job.recipe.rule,
                tau=float(job.recipe.tau) if job.recipe.rule == "paper" else None,
                align=job.recipe.align,
                pairing=job.recipe.pairing,
                compression=float(options.compression),
                seed=options.seed,
                calibration=calibration,
                source_sha256=source_hash.hexdigest(),
                tool_version=vllm_puzzle.__version__,
            ),
        )
        writer.add_json("config.json", {**checkpoint.raw_config, "quantization_config": quantization.model_dump()})
        for file in checkpoint.other_files():
            writer.add_copy(file)
        total = MergeStatistics()
        for layer_report in reports:
            total.add(layer_report.statistics)
        result = ConvertResult(
            expert_bytes_before=sum(checkpoint.tensors[name].num_bytes for name in expected_experts(shape)),
            expert_bytes_after=expert_bytes_after,
            checkpoint_bytes_before=checkpoint.num_bytes,
            checkpoint_bytes_after=writer.num_bytes,
            relative_error=total.relative_error,
        )
        card = ModelCard(
            source.absolute().name, destination.name, quantization, result, reports, checkpoint.is_quantized
        )
        write_model_card(writer, card)
    return result


def _choose_recipe(
    options: ConvertOptions,
    checkpoint: Checkpoint,
    config: Any,
    names: dict[int | None, list[str]],
    shape: MoEShape,
    device: torch.device,
    num_tokens: int,
    all_paired: bool,
    report: Report,
) -> Recipe:
    """The best recipe that the options leave open and the machine can do in reasonable time; says what it will cost."""
    experts = expected_experts(shape)
    sizes = {
        layer: sum(checkpoint.tensors[name].plain_bytes for name in group)
        for layer, group in names.items()
        if layer is not None
    }
    dense = sum(
        math.prod(checkpoint.tensors[name].shape) for layer in sizes for name in names[layer] if name not in experts
    )
    work = Work(
        shape,
        pairs=int(shape.num_experts * len(shape.moe_layers) * options.compression / 100),
        all_paired=all_paired,
        num_tokens=num_tokens,
        top_k=config.num_experts_per_tok,
        layer_bytes=max(sizes.values()),
        dense_weights=dense,
    )
    speed = measure_speed(device)
    recipe, cost = choose_recipe([(recipe, estimate(recipe, work, speed)) for recipe in options.recipes()])
    report(f"rule {recipe.rule}{' with aligned neurons' if recipe.align else ''} on {options.device}: {cost}")
    return recipe


def _describe_mates(job: Job, layers: Sequence[Sequence[Mates]]) -> str:
    chosen = [each for layer in layers for each in layer]
    if not chosen:
        return "no experts are paired"
    sizes = [len(layer) for layer in layers]
    counts = f"pairing {job.recipe.pairing}: {len(chosen)} pairs, {min(sizes)} to {max(sizes)} a layer"
    if job.calibrator is None:
        return counts
    loss = sum(each.loss for each in chosen) / len(layers)
    coactivation = sum(each.coactivation for each in chosen) / len(chosen)
    return (
        f"{counts}; estimated loss {loss:.3g} of the residual stream's energy a layer, mates fire together on "
        f"{coactivation:.1%} of the tokens that reach either"
    )
