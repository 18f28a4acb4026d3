"""The conversion: a source checkpoint in, a packed checkpoint out, one decoder layer in memory at a time."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import vllm_puzzle
from vllm_puzzle.format import (
    FormatError,
    LayerSlots,
    Provenance,
    PuzzleMoEQuantizationConfig,
    default_max_expert_parallel,
    pack_single,
    packed_name,
    parse_packed_name,
)

from .calibration import DEFAULT_SEQUENCES, Calibrator, ExpertNorms, read_calibration
from .checkpoint import Checkpoint, SourceHash
from .errors import CheckpointError
from .experts import check_experts, expected_experts
from .families import MoEShape, find_moe_shape
from .merging import RULES, MergeStatistics, merge_pair
from .model_card import ConvertResult, LayerReport, ModelCard, write_model_card
from .pairing import count_pairs, pair_at_random
from .writer import check_destination, new_checkpoint

Report = Callable[[str], None]
"""Takes one sentence for the user."""

Progress = Callable[[int, int], None]
"""Takes how many bytes were dealt with since the last call, and how many there are in all."""


@dataclass(frozen=True)
class ConvertOptions:
    """What the command line's options of the same names say.

    `max_expert_parallel` None takes `default_max_expert_parallel`; `calibration` None weighs by magnitude alone.
    """

    calibration: Path | None = None
    calibration_sequences: int = DEFAULT_SEQUENCES
    rule: str = "paper"
    tau: float = 0.4
    compression: float = 50.0
    max_expert_parallel: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise CheckpointError(f"--rule {self.rule} is not known; choose one of {sorted(RULES)}")
        if not 0 <= self.tau <= 1:
            raise CheckpointError(f"--tau {self.tau:g} is outside 0 to 1; the paper uses 0.4 for every model")
        if not 0 <= self.compression <= 50:
            raise CheckpointError(
                f"--compression {self.compression:g} is outside 0 to 50; a pair takes the place of one expert, "
                f"so 50 is the most"
            )
        if self.calibration_sequences < 1:
            raise CheckpointError(f"--calibration-sequences {self.calibration_sequences} is not at least 1")
        if self.max_expert_parallel is not None and self.max_expert_parallel < 1:
            raise CheckpointError(f"--max-expert-parallel {self.max_expert_parallel} is not at least 1")


def convert(
    source: Path, destination: Path, options: ConvertOptions, report: Report, progress: Progress
) -> ConvertResult:
    """Writes `destination`, a packed checkpoint of `source`.

    Raises:
        CheckpointError: an option, the source or the destination is at fault; nothing was written under that name.
    """
    checkpoint = Checkpoint(source)
    if "quantization_config" in checkpoint.raw_config:
        method = checkpoint.raw_config["quantization_config"].get("quant_method")
        raise CheckpointError(f"{source} is already quantized ({method}); convert the original BF16 checkpoint")
    config = checkpoint.config
    shape = find_moe_shape(config, str(source / "config.json"))
    check_experts(checkpoint, shape)
    max_expert_parallel = options.max_expert_parallel or default_max_expert_parallel(shape.num_experts)
    pairs = count_pairs(shape.num_experts, options.compression, max_expert_parallel)
    check_destination(destination, checkpoint.num_bytes)
    generator = random.Random(options.seed)
    slots = {
        layer: pair_at_random(layer, shape.num_experts, pairs, max_expert_parallel, generator)
        for layer in shape.moe_layers
    }
    calibration, calibrator = None, None
    if options.calibration is None:
        report("no calibration text was given: experts are weighed by the magnitude of their weights alone")
    else:
        token_ids, calibration = read_calibration(
            options.calibration, checkpoint, config, options.calibration_sequences
        )
        calibrator = Calibrator(checkpoint, config, shape, token_ids)

    groups = _group_by_layer(checkpoint, shape)
    source_hash = SourceHash()
    reports: list[LayerReport] = []
    expert_bytes_after = 0
    with new_checkpoint(destination, len(groups)) as writer:
        for layer, names in groups.items():
            tensors = checkpoint.read(names)
            for name, tensor in tensors.items():
                source_hash.add(name, tensor)
            if layer is not None:
                norms = calibrator.advance(layer, tensors) if calibrator else ExpertNorms.uniform(shape)
                if layer in slots:
                    assert norms is not None
                    if calibrator:
                        _report_idle_experts(layer, norms, report)
                    statistics = _pack_layer(tensors, shape, slots[layer], norms, options)
                    reports.append(LayerReport(layer, slots[layer].pairs, statistics))
            writer.add_shard(tensors)
            expert_bytes_after += sum(tensor.nbytes for name, tensor in tensors.items() if parse_packed_name(name))
            progress(sum(checkpoint.tensors[name].num_bytes for name in names), checkpoint.num_bytes)
        writer.add_index()
        quantization = PuzzleMoEQuantizationConfig(
            num_experts=shape.num_experts,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            max_expert_parallel=max_expert_parallel,
            layers=list(slots.values()),
            provenance=Provenance(
                rule=options.rule,
                tau=float(options.tau),
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
        write_model_card(writer, ModelCard(source.absolute().name, destination.name, quantization, result, reports))
    return result


def _group_by_layer(checkpoint: Checkpoint, shape: MoEShape) -> dict[int | None, list[str]]:
    """Tensor names by decoder layer, None for those of no layer; one group is one shard of the output."""
    layers: list[int | None] = [None, *range(shape.num_hidden_layers)]
    groups: dict[int | None, list[str]] = {layer: [] for layer in layers}
    prefixes = {shape.layer_prefix(layer): layer for layer in range(shape.num_hidden_layers)}
    for name in sorted(checkpoint.tensors):
        prefix = ".".join(name.split(".")[:3]) + "."
        groups[prefixes.get(prefix)].append(name)
    return {layer: names for layer, names in groups.items() if names}


def _report_idle_experts(layer: int, norms: ExpertNorms, report: Report) -> None:
    idle = (norms.tokens == 0).nonzero().flatten().tolist()
    if idle:
        report(
            f"layer {layer}: experts {idle} saw no calibration token, so every element that cannot be shared goes to "
            f"their mates; calibrate on more text"
        )


def _pack_layer(
    tensors: dict[str, torch.Tensor], shape: MoEShape, slots: LayerSlots, norms: ExpertNorms, options: ConvertOptions
) -> MergeStatistics:
    """Replaces the expert matrices among `tensors` by packed ones, a slot at a time."""
    layer, prefix = slots.layer, shape.experts_prefix(slots.layer)
    rule = RULES[options.rule]
    total = MergeStatistics()
    down = shape.family.projections[2]
    try:
        for slot in range(slots.num_slots):
            members = slots.members(slot)
            for projection in shape.family.projections:
                names = [shape.expert_name(layer, expert, projection) for expert in members]
                weights = [tensors.pop(name) for name in names]
                table = norms.intermediate if projection == down else norms.hidden
                if len(members) == 1:
                    words = pack_single(weights[0], name=names[0])
                else:
                    words, statistics = merge_pair(
                        (weights[0], weights[1]),
                        (table[members[0]], table[members[1]]),
                        rule,
                        options.tau,
                        (names[0], names[1]),
                    )
                    total.add(statistics)
                tensors[packed_name(prefix, members[0], projection)] = words
    except FormatError as error:
        raise CheckpointError(str(error)) from None
    return total
