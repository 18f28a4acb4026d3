"""Back from a packed checkpoint to a plain BF16 one that any tool loads."""

from pathlib import Path

from vllm_puzzle.format import unpack

from .convert import Progress
from .experts import fuse_experts
from .job import names_by_layer
from .packed import PackedCheckpoint
from .writer import check_destination, new_checkpoint


def unpack_checkpoint(source: Path, destination: Path, progress: Progress) -> None:
    """Writes `destination`: the packed checkpoint `source` with every expert's matrices in BF16, laid out as
    the family's checkpoints on the hub are.

    Raises:
        CheckpointError: the source is not a whole packed checkpoint, or the destination is at fault.
    """
    packed = PackedCheckpoint(source)
    checkpoint = packed.checkpoint
    check_destination(destination, 2 * checkpoint.num_bytes)
    layers = names_by_layer(checkpoint, packed.shape)
    with new_checkpoint(destination, len(layers)) as writer:
        for layer, names in layers.items():
            tensors = checkpoint.read(names)
            for name in names:
                members = packed.members(name)
                if members is None:
                    continue
                words = tensors.pop(name)
                for member, expert_name in enumerate(members):
                    tensors[expert_name] = unpack(words, member, packed.layout)
            if layer in packed.shape.moe_layers:
                fuse_experts(packed.shape, layer, tensors)
            writer.add_shard(tensors)
            progress(sum(checkpoint.tensors[name].num_bytes for name in names), checkpoint.num_bytes)
        writer.add_index()
        config = {key: value for key, value in checkpoint.raw_config.items() if key != "quantization_config"}
        writer.add_json("config.json", config)
        for file in checkpoint.other_files():
            writer.add_copy(file)
