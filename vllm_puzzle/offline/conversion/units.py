"""Units of a conversion: each is written alone, to shards of its own, in any order and by any process."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_puzzle.format import WORD16, FormatError, LayerSlots, packed_name, unpack

from ..checkpoints.checkpoint import SourceHash
from ..checkpoints.expert_tensors import layer_names
from ..checkpoints.manifest import LayerEntry, ShardEntry
from ..checkpoints.shards import ShardLayout, ShardWriter, TensorLayout, lay_out_shards
from ..errors import CheckpointError
from ..merging.layer import ExpertWeights, LayerTokens
from ..merging.merge_layer import merge_layer
from ..merging.pair import MergeStatistics
from ..merging.pair_loss import Mates
from .job import Job


@dataclass(frozen=True)
class Unit:
    """A decoder layer, or all tensors of no layer, and the files it becomes.

    `number` counts the units in the order in which they are written; `slots` is None where there are no experts.
    """

    number: int
    layer: int | None
    slots: LayerSlots | None
    shards: tuple[ShardLayout, ...]


@dataclass(frozen=True)
class LayerReport:
    """What merging did to one MoE layer; `mates` is empty where nothing was estimated."""

    slots: LayerSlots
    statistics: MergeStatistics
    mates: list[Mates]

    def to_manifest(self) -> LayerEntry:
        return LayerEntry(
            layer=self.slots.layer,
            pairs=self.slots.pairs,
            estimated_loss=sum(each.loss for each in self.mates) if self.mates else None,
            coactivation=sum(each.coactivation for each in self.mates) / len(self.mates) if self.mates else None,
            shared_fraction=self.statistics.shared_fraction,
            kept_fraction=self.statistics.kept_fraction,
            relative_error=self.statistics.relative_error,
        )


@dataclass(frozen=True)
class UnitResult:
    """The shards of a written unit, the lines of `SourceHash` of what was read, and what merging did to its experts."""

    shards: list[ShardEntry]
    source: list[str]
    report: LayerReport | None

    def to_json(self) -> dict[str, Any]:
        report = self.report and {
            "slots": self.report.slots.model_dump(),
            "statistics": asdict(self.report.statistics),
            "mates": [asdict(mates) for mates in self.report.mates],
        }
        return {"shards": [entry.model_dump() for entry in self.shards], "source": self.source, "report": report}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "UnitResult":
        report = content["report"]
        if report is not None:
            mates = [Mates.from_json(each) for each in report["mates"]]
            report = LayerReport(LayerSlots(**report["slots"]), MergeStatistics(**report["statistics"]), mates)
        return cls([ShardEntry(**entry) for entry in content["shards"]], content["source"], report)


def make_units(job: Job, slots: Mapping[int, LayerSlots], shard_size: int) -> list[Unit]:
    """Every unit, tensors of no layer first; `shard_size` as in `lay_out_shards`."""
    layers = [(layer, slots.get(layer) if layer is not None else None) for layer in job.names]
    shards = lay_out_shards([list(_lay_out_unit(job, *each)) for each in layers], shard_size)
    return [Unit(number, *layers[number], tuple(files)) for number, files in enumerate(shards)]


def _lay_out_unit(job: Job, layer: int | None, slots: LayerSlots | None) -> Iterator[TensorLayout]:
    """A unit's tensors in the order in which they are written: what is copied, and then slot after slot."""
    shape = job.shape
    copied = [TensorLayout.copy_of(name, job.checkpoint.tensors[name]) for name in job.names_beside_experts(layer)]
    # The widest elements first, so that all lie at multiples of their size.
    yield from sorted(copied, key=lambda tensor: (-tensor.element_bytes, tensor.name))
    if layer is None or slots is None:
        return
    for slot in range(slots.num_slots):
        for projection in shape.family.projections:
            name = packed_name(shape.experts_prefix(layer), slots.first_member(slot), projection)
            size = shape.projection_shape(projection)
            yield TensorLayout(name, WORD16.safetensors_dtype, size, 2 * size[0] * size[1])


@torch.inference_mode()
def write_unit(
    job: Job, unit: Unit, directory: Path, tokens: LayerTokens | None, merged: ExpertWeights | None = None
) -> UnitResult:
    """Merges, packs and writes a unit.

    Args:
        merged: receives the merged experts as a reader of the checkpoint finds them.

    Raises:
        CheckpointError: a tensor cannot be read, or no word holds an element; names tensor and index.
        OSError: the disk is full or cannot be written.
    """
    source = SourceHash()

    def read(names: Iterable[str]) -> list[torch.Tensor]:
        tensors = job.checkpoint.read(names)
        for name, tensor in tensors.items():
            source.add(name, tensor)
        return list(tensors.values())

    copied = set(job.names_beside_experts(unit.layer))
    with ShardWriter(directory, unit.shards) as writer:
        for shard in unit.shards:
            for tensor in shard.tensors:
                if tensor.name in copied:
                    writer.write(tensor.name, *read([tensor.name]))
        report = None
        if unit.layer is not None and unit.slots is not None:
            report = _write_experts(job, unit.layer, unit.slots, read, tokens, merged, writer)
    return UnitResult(writer.entries, source.lines, report)


def _write_experts(
    job: Job,
    layer: int,
    slots: LayerSlots,
    read: Callable[[Iterable[str]], list[torch.Tensor]],
    tokens: LayerTokens | None,
    merged: ExpertWeights | None,
    writer: ShardWriter,
) -> LayerReport:
    prefix, names = job.shape.experts_prefix(layer), layer_names(job.shape, layer)

    def read_expert(expert: int) -> list[torch.Tensor]:
        return [matrix.to(job.device) for matrix in read(names[expert])]

    def emit(slot: int, position: int, words: torch.Tensor) -> None:
        members = slots.members(slot)
        writer.write(packed_name(prefix, members[0], job.shape.family.projections[position]), words.cpu())
        if merged is not None:
            for member, expert in enumerate(members):
                (merged.gate, merged.up, merged.down)[position][expert] = unpack(words, member)

    try:
        done = merge_layer(read_expert, job.activation, names, slots, job.recipe, emit, tokens)
    except FormatError as error:
        raise CheckpointError(str(error)) from None
    return LayerReport(slots, done.statistics, done.mates)
