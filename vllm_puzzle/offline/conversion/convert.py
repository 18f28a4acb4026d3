"""The conversion: a source checkpoint in, a packed checkpoint out, one decoder layer in memory at a time."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers.activations import ACT2FN

import vllm_puzzle
from vllm_puzzle.format import (
    Calibration,
    LayerSlots,
    Provenance,
    PuzzleMoEQuantizationConfig,
    default_max_expert_parallel,
    packed_config,
    parse_packed_name,
)

from ..checkpoints.checkpoint import Checkpoint, SourceHash
from ..checkpoints.dense import check_dense
from ..checkpoints.expert_tensors import check_experts, expected_experts
from ..checkpoints.families import MoEShape
from ..checkpoints.manifest import MANIFEST_FILE, Manifest
from ..checkpoints.source import SourceCheckpoint
from ..checkpoints.writer import CheckpointWriter, check_destination, check_room
from ..merging.packing import LIBRARY_PATH, is_compiled
from ..merging.pair import MergeStatistics
from ..merging.pair_loss import Mates
from ..merging.recipe import Recipe
from ..progress import Progress, Report
from ..wording import label
from .calibration import Calibrator, read_calibration
from .choose_pairs import plan
from .estimate import Work, estimate, measure_speed
from .job import Job, names_by_layer
from .journal import check_unfinished, work_directory
from .model_card import ConvertResult, ModelCard, write_model_card
from .options import ConvertOptions, choose_recipe
from .origin import origin_of
from .pairing import count_pairs, layer_slots, most_pairs, pair_at_random, pair_budget
from .runner import write_all
from .units import LayerReport, Unit, UnitResult, mates_from_json, plan_units


def convert(
    source: Path,
    destination: Path,
    options: ConvertOptions,
    report: Report,
    progress: Progress,
    resume: bool = False,
) -> ConvertResult:
    """Writes `destination`, a packed checkpoint of `source`.

    Args:
        resume: resume an interrupted conversion to `destination`; what comes out is what it would have been.

    Raises:
        CheckpointError: an option, the source or the destination is at fault; nothing was written under that name.
    """
    check_destination(destination)
    check_unfinished(destination, resume)
    checkpoint = SourceCheckpoint(source)
    config, shape = checkpoint.config, checkpoint.shape
    check_experts(checkpoint, shape)
    check_dense(checkpoint.shapes, config, shape, source, "download the checkpoint again")
    device = options.torch_device()
    if device.type == "cpu" and not is_compiled():
        report(
            f"{LIBRARY_PATH.name} was not compiled when vllm-puzzle was installed (it takes Linux on x86-64 and g++): "
            f"torch merges instead, and converting takes nearly twice as long"
        )
    max_expert_parallel = options.max_expert_parallel or default_max_expert_parallel(shape.num_experts)
    pairs = count_pairs(shape.num_experts, options.compression, max_expert_parallel)
    all_paired = pairs == most_pairs(shape.num_experts, max_expert_parallel)
    if not resume:
        check_room(destination, checkpoint.plain_bytes)
    token_ids, calibration, calibrator = None, None, None
    if options.calibration is None:
        report("no calibration text was given: experts are weighed by the magnitude of their weights alone")
    else:
        token_ids, calibration = read_calibration(
            options.calibration, checkpoint, config, options.calibration_sequences
        )
        calibrator = Calibrator(checkpoint, config, shape, device)
        if calibrator.left_out:
            report(
                f"calibration leaves out {len(calibrator.left_out)} tensors that transformers' own model has no place "
                f"for, the first is {calibrator.left_out[0]}; they are copied, and vLLM may refuse them"
            )
    names = names_by_layer(checkpoint, shape)
    sizes = {layer: sum(checkpoint.tensors[name].num_bytes for name in group) for layer, group in names.items()}
    num_tokens = 0 if token_ids is None else token_ids.numel()

    def choose() -> Recipe:
        return _choose_recipe(options, checkpoint, config, names, shape, device, num_tokens, all_paired, report)

    # What it costs is said before anything is written; the rule of a conversion that goes on is settled.
    recipe = None if resume else choose()
    with work_directory(destination, origin_of(checkpoint, options), resume) as (writer, journal):
        planned = journal.find("plan")
        if planned is not None:
            recipe = Recipe.from_json(planned["recipe"])
        elif recipe is None:
            recipe = choose()
        job = Job(
            checkpoint,
            names,
            shape,
            ACT2FN[config.hidden_act],
            device,
            calibrator,
            token_ids,
            max_expert_parallel,
            recipe,
            options.seed,
        )
        chooses = recipe.chooses(all_paired)
        total = checkpoint.num_bytes + (sum(sizes[layer] for layer in job.decoder_layers) if chooses else 0)

        def advance(layer: int | None) -> None:
            progress(sizes[layer], total)

        if planned is None:
            slots, mates = _choose_pairs(job, options, advance) if chooses else (_draw_pairs(job, pairs), {})
            journal.record("plan", _plan_to_json(recipe, slots, mates))
        else:
            slots, mates = _plan_from_json(planned)
            if chooses:
                for layer in job.decoder_layers:
                    advance(layer)
        if chooses:
            report(_describe_mates(job, list(mates.values())))
        units = plan_units(job, slots, options.shard_size)
        results: list[UnitResult] = []
        # Closed before the directory is: whoever still writes into it ends then.
        with closing(write_all(job, units, journal, options.workers, report)) as written:
            for unit, result in written:
                results.append(result)
                advance(unit.layer)
        reports = [result.report for result in results if result.report is not None]
        if chooses:
            reports = [replace(each, mates=mates[each.slots.layer]) for each in reports]
        elif recipe.rule.estimates_loss:
            report(_describe_mates(job, [each.mates for each in reports]))
        return _finish(job, options, calibration, units, results, reports, writer, label(destination))


def _choose_pairs(
    job: Job, options: ConvertOptions, advance: Callable[[int], None]
) -> tuple[dict[int, LayerSlots], dict[int, list[Mates]]]:
    """The pairs of least estimated loss over all layers, and what is expected of them."""
    num_experts = job.shape.num_experts
    budget = pair_budget(num_experts, len(job.shape.moe_layers), options.compression)
    mates = plan(job, budget, advance)
    slots = {
        layer: layer_slots(layer, num_experts, [each.experts for each in chosen]) for layer, chosen in mates.items()
    }
    return slots, mates


def _draw_pairs(job: Job, pairs: int) -> dict[int, LayerSlots]:
    generator = random.Random(job.seed)
    return {
        layer: pair_at_random(layer, job.shape.num_experts, pairs, job.max_expert_parallel, generator)
        for layer in job.shape.moe_layers
    }


def _plan_to_json(
    recipe: Recipe, slots: Mapping[int, LayerSlots], mates: Mapping[int, Sequence[Mates]]
) -> dict[str, Any]:
    return {
        "recipe": recipe.to_json(),
        "slots": [each.model_dump() for each in slots.values()],
        "mates": [[layer, [asdict(each) for each in chosen]] for layer, chosen in mates.items()],
    }


def _plan_from_json(content: Mapping[str, Any]) -> tuple[dict[int, LayerSlots], dict[int, list[Mates]]]:
    slots = [LayerSlots(**each) for each in content["slots"]]
    mates = {layer: mates_from_json(chosen) for layer, chosen in content["mates"]}
    return {each.layer: each for each in slots}, mates


def _finish(
    job: Job,
    options: ConvertOptions,
    calibration: Calibration | None,
    units: Sequence[Unit],
    results: Sequence[UnitResult],
    reports: list[LayerReport],
    writer: CheckpointWriter,
    name: str,
) -> ConvertResult:
    """Everything around the shards."""
    checkpoint, shape, recipe = job.checkpoint, job.shape, job.recipe
    shards = [shard for unit in units for shard in unit.shards]
    written = [tensor for shard in shards for tensor in shard.tensors]
    quantization = PuzzleMoEQuantizationConfig(
        num_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        max_expert_parallel=job.max_expert_parallel,
        layers=[unit.slots for unit in units if unit.slots is not None],
        provenance=Provenance(
            rule=recipe.rule.name,
            tau=float(recipe.tau) if recipe.rule.reads_tau else None,
            align=recipe.align,
            pairing=recipe.pairing,
            compression=float(options.compression),
            seed=options.seed,
            calibration=calibration,
            source_sha256=SourceHash(line for result in results for line in result.source).hexdigest(),
            tool_version=vllm_puzzle.__version__,
        ),
    )
    total = MergeStatistics()
    for report in reports:
        total.add(report.statistics)
    result = ConvertResult(
        expert_bytes_before=sum(checkpoint.tensors[name].num_bytes for name in expected_experts(shape)),
        expert_bytes_after=sum(tensor.num_bytes for tensor in written if parse_packed_name(tensor.name)),
        checkpoint_bytes_before=checkpoint.num_bytes,
        checkpoint_bytes_after=sum(tensor.num_bytes for tensor in written),
        relative_error=total.relative_error,
    )
    writer.add_index(shards)
    writer.add_json("config.json", packed_config(checkpoint.raw_config, quantization))
    manifest = Manifest(
        tool_version=vllm_puzzle.__version__,
        shards=[entry for each in results for entry in each.shards],
        layers=[report.to_manifest() for report in reports],
    )
    writer.add_json(MANIFEST_FILE, manifest.model_dump())
    writer.add_copies(checkpoint.path, checkpoint.other_files())
    source = label(checkpoint.path.absolute())
    write_model_card(writer, ModelCard(source, name, quantization, result, reports, checkpoint.is_quantized))
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
        pairs=pair_budget(shape.num_experts, len(shape.moe_layers), options.compression),
        all_paired=all_paired,
        num_tokens=num_tokens,
        top_k=config.num_experts_per_tok,
        layer_bytes=max(sizes.values()),
        dense_weights=dense,
        jobs=options.jobs,
    )
    speed = measure_speed(device)
    recipe, cost = choose_recipe([(recipe, estimate(recipe, work, speed)) for recipe in options.recipes()])
    report(f"rule {recipe.rule.name}{' with aligned neurons' if recipe.align else ''} on {options.device}: {cost}")
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
