"""Units of a conversion: each is written alone, to shards of its own, in any order and by any process."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_puzzle.format import FormatError

from ..checkpoints.checkpoint import SourceHash
from ..checkpoints.expert_tensors import layer_names
from ..checkpoints.manifest import ShardEntry
from ..checkpoints.shards import ShardLayout, ShardWriter, TensorLayout, lay_out_shards
from ..errors import CheckpointError
from ..merging.layer import ExpertWeights, LayerTokens
from .job import Job
from .method import LayerReport, Layout, Method


@dataclass(frozen=True)
class Unit:
    """A decoder layer, or all tensors of no layer, and the files it becomes.

    `number` counts the units in the order in which they are written; `layout` is None where there are no experts.
    """

    number: int
    layer: int | None
    layout: Layout | None
    shards: tuple[ShardLayout, ...]


@dataclass(frozen=True)
class UnitResult:
    """The shards of a written unit, the lines of `SourceHash` of what was read, and what was done to its experts."""

    shards: list[ShardEntry]
    source: list[str]
    report: LayerReport | None

    def to_json(self) -> dict[str, Any]:
        report = self.report and self.report.to_json()
        return {"shards": [entry.model_dump() for entry in self.shards], "source": self.source, "report": report}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], method: Method) -> "UnitResult":
        report = None if content["report"] is None else method.read_report(content["report"])
        return cls([ShardEntry(**entry) for entry in content["shards"]], content["source"], report)


def make_units(job: Job, layouts: Mapping[int, Layout], shard_size: int) -> list[Unit]:
    """Every unit, tensors of no layer first; `shard_size` as in `lay_out_shards`."""
    layers = [(layer, layouts.get(layer) if layer is not None else None) for layer in job.names]
    shards = lay_out_shards([list(_lay_out_unit(job, *each)) for each in layers], shard_size)
    return [Unit(number, *layers[number], tuple(files)) for number, files in enumerate(shards)]


def _lay_out_unit(job: Job, layer: int | None, layout: Layout | None) -> Iterator[TensorLayout]:
    """A unit's tensors in the order in which they are written: what is copied, and then expert after expert."""
    copied = [TensorLayout.copy_of(name, job.checkpoint.tensors[name]) for name in job.names_beside_experts(layer)]
    # The widest elements first, so that all lie at multiples of their size.
    yield from sorted(copied, key=lambda tensor: (-tensor.element_bytes, tensor.name))
    if layout is not None:
        yield from job.method.lay_out(job.shape, layout)


@torch.inference_mode()
def write_unit(
    job: Job, unit: Unit, directory: Path, tokens: LayerTokens | None, converted: ExpertWeights | None = None
) -> UnitResult:
    """Converts and writes a unit.

    Args:
        converted: receives the experts as a reader of the checkpoint finds them.

    Raises:
        CheckpointError: a tensor cannot be read, or has an element that cannot be stored; names tensor and index.
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
        if unit.layout is not None:
            report = _write_experts(job, unit.layout, read, tokens, converted, writer)
    return UnitResult(writer.entries, source.lines, report)


def _write_experts(
    job: Job,
    layout: Layout,
    read: Callable[[Iterable[str]], list[torch.Tensor]],
    tokens: LayerTokens | None,
    converted: ExpertWeights | None,
    writer: ShardWriter,
) -> LayerReport:
    names = layer_names(job.shape, layout.layer)

    def read_expert(expert: int) -> list[torch.Tensor]:
        return [matrix.to(job.device) for matrix in read(names[expert])]

    def write(name: str, tensor: torch.Tensor) -> None:
        writer.write(name, tensor.cpu())

    try:
        return job.method.convert_layer(job, layout, read_expert, write, tokens, converted)
    except FormatError as error:
        raise CheckpointError(str(error)) from None
