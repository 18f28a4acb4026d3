"""Back from a packed checkpoint to a plain BF16 one that any tool loads."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_puzzle.format import plain_config

from .checkpoints.destination import check_destination, check_room, new_checkpoint
from .checkpoints.expert_tensors import expected_experts, fuse_experts
from .checkpoints.packed import PackedCheckpoint
from .checkpoints.shards import ShardWriter, TensorLayout, lay_out_shards
from .conversion.job import names_by_layer
from .defaults import DEFAULT_SHARD_SIZE
from .progress import Progress


@dataclass(frozen=True)
class UnpackResult:
    """Bytes of all tensors, of the packed checkpoint and of the plain one."""

    checkpoint_bytes_before: int
    checkpoint_bytes_after: int


def unpack_checkpoint(source: Path, destination: Path, progress: Progress) -> UnpackResult:
    """Writes `destination`: the packed checkpoint `source` with every expert's matrices in BF16.

    Tensors have the layout of the family's checkpoints on the hub. One matrix is in memory at a time, or gate and up
    where they are coded together, or one layer where that layout has its experts in three-dimensional tensors.

    Raises:
        CheckpointError: the source is not a whole packed checkpoint, or the destination is at fault.
    """
    check_destination(destination, source)
    packed = PackedCheckpoint(source)
    checkpoint = packed.checkpoint
    groups = names_by_layer(checkpoint, packed.shape)
    matrices = expected_experts(packed.shape)
    layouts = [list(_lay_out(packed, layer, names, matrices)) for layer, names in groups.items()]
    shards = [shard for group in lay_out_shards(layouts, DEFAULT_SHARD_SIZE) for shard in group]
    num_bytes = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
    check_room(destination, num_bytes)
    with new_checkpoint(destination) as writer:
        with ShardWriter(writer.directory, shards) as file:
            for layer, names in groups.items():
                for name, tensor in _tensors(packed, layer, names):
                    file.write(name, tensor)
                progress(sum(checkpoint.tensors[name].num_bytes for name in names), checkpoint.num_bytes)
        writer.add_index(shards)
        writer.add_json("config.json", plain_config(checkpoint.raw_config))
        writer.add_copies(checkpoint.path, checkpoint.other_files())
    return UnpackResult(checkpoint.num_bytes, num_bytes)


def _is_fused(packed: PackedCheckpoint, layer: int | None) -> bool:
    is_moe = layer in packed.shape.moe_layers and layer not in packed.quantization.plain_layers
    return packed.shape.family.hub_is_fused and is_moe


def _lay_out(
    packed: PackedCheckpoint, layer: int | None, names: Iterable[str], matrices: Mapping[str, tuple[int, int]]
) -> Iterator[TensorLayout]:
    """A layer's tensors in the order of `_tensors`; `matrices` are the shapes of all experts' by source name."""
    is_fused = _is_fused(packed, layer)
    for name in names:
        members = packed.members(name)
        if members is None:
            yield TensorLayout.copy_of(name, packed.checkpoint.tensors[name])
        elif not is_fused:
            yield from (_in_bf16(expert_name, matrices[expert_name]) for expert_name in members)
    if not is_fused:
        return
    assert layer is not None
    shape, fused = packed.shape, packed.shape.family.fused[0]
    sizes = fused.shapes(shape.num_experts, shape.hidden_size, shape.intermediate_size)
    for name, size in zip((fused.gate_up, fused.down), sizes, strict=True):
        yield _in_bf16(shape.block_prefix(layer) + name, size)


def _in_bf16(name: str, size: tuple[int, ...]) -> TensorLayout:
    return TensorLayout(name, "BF16", size, 2 * math.prod(size))


def _tensors(packed: PackedCheckpoint, layer: int | None, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    experts: dict[str, torch.Tensor] = {}
    for name in names:
        if packed.members(name) is None:
            yield name, packed.checkpoint.read([name])[name]
        elif _is_fused(packed, layer):
            experts |= packed.decode(name)
        else:
            yield from packed.decode(name).items()
    if layer is not None and experts:
        fuse_experts(packed.shape, layer, experts)
        yield from experts.items()
