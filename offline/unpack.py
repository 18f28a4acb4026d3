"""Back from a packed checkpoint to a plain BF16 one that any tool loads."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from vllm_puzzle.format import unpack

from .convert import Progress
from .options import DEFAULT_SHARD_SIZE
from .packed import PackedCheckpoint
from .shards import Planned, ShardWriter, plan_shards
from .writer import check_destination, new_checkpoint


def unpack_checkpoint(source: Path, destination: Path, progress: Progress) -> None:
    """Writes `destination`: the packed checkpoint `source` with every expert's matrices in BF16 under its own name.

    One matrix is in memory at a time.

    Raises:
        CheckpointError: the source is not a whole packed checkpoint, or the destination is at fault.
    """
    packed = PackedCheckpoint(source)
    checkpoint = packed.checkpoint
    groups = list(checkpoint.by_shard(sorted(checkpoint.tensors)).values())
    plans = plan_shards([list(_plan(packed, names)) for names in groups], DEFAULT_SHARD_SIZE)
    shards = [shard for group in plans for shard in group]
    check_destination(destination, sum(tensor.num_bytes for shard in shards for tensor in shard.tensors))
    with new_checkpoint(destination) as writer:
        with ShardWriter(writer.directory, shards) as file:
            for name in (name for names in groups for name in names):
                tensor = checkpoint.read([name])[name]
                members = packed.members(name)
                if members is None:
                    file.write(name, tensor)
                else:
                    for member, expert_name in enumerate(members):
                        file.write(expert_name, unpack(tensor, member, packed.layout))
                progress(checkpoint.tensors[name].num_bytes, checkpoint.num_bytes)
        writer.add_index(shards)
        config = {key: value for key, value in checkpoint.raw_config.items() if key != "quantization_config"}
        writer.add_json("config.json", config)
        for path in checkpoint.other_files():
            writer.add_copy(path)


def _plan(packed: PackedCheckpoint, names: Iterable[str]) -> Iterator[Planned]:
    for name in names:
        info = packed.checkpoint.tensors[name]
        members = packed.members(name)
        if members is None:
            yield Planned.copy_of(name, info)
        else:
            for expert_name in members:
                yield Planned(expert_name, "BF16", info.shape, info.num_bytes)
