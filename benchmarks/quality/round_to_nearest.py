"""The obvious alternatives to packing, for comparison: routed experts rounded to FP8 or INT4.

    python -m benchmarks.quality.round_to_nearest SOURCE DEST --to fp8|int4

Writes a copy of a checkpoint in which every expert matrix has been rounded to the nearest and turned back into BF16,
so that whatever measures SOURCE can measure DEST. FP8 is e4m3 with a scale per output row; INT4 is symmetric with a
scale per 128 input channels. Neither uses calibration; GPTQ and AWQ do better than this INT4.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Literal

import torch

from vllm_puzzle.offline.checkpoints.checkpoint import Checkpoint
from vllm_puzzle.offline.checkpoints.destination import check_destination, check_room, new_checkpoint
from vllm_puzzle.offline.checkpoints.expert_tensors import check_experts, expected_experts
from vllm_puzzle.offline.checkpoints.shape import find_moe_shape
from vllm_puzzle.offline.checkpoints.shards import ShardWriter, TensorLayout, lay_out_shards
from vllm_puzzle.offline.defaults import DEFAULT_SHARD_SIZE
from vllm_puzzle.offline.errors import CheckpointError

Format = Literal["fp8", "int4"]

GROUP_SIZE = 128


def round_to_fp8(weight: torch.Tensor) -> torch.Tensor:
    """(rows, columns), any floating dtype, through e4m3 with one scale a row; bfloat16."""
    wide = weight.float()
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = (wide.abs().amax(dim=1, keepdim=True) / largest).clamp(min=1e-12)
    return ((wide / scale).to(torch.float8_e4m3fn).float() * scale).bfloat16()


def round_to_int4(weight: torch.Tensor) -> torch.Tensor:
    """(rows, columns), any floating dtype, through -8 to 7 with one scale per GROUP_SIZE columns; bfloat16."""
    parts = []
    for group in weight.float().split(GROUP_SIZE, dim=1):
        scale = (group.abs().amax(dim=1, keepdim=True) / 7).clamp(min=1e-12)
        parts.append((group / scale).round().clamp(-8, 7) * scale)
    return torch.cat(parts, dim=1).bfloat16()


def round_experts(source: Path, destination: Path, to: Format) -> None:
    """Writes `destination`; raises CheckpointError as the converter does."""
    checkpoint = Checkpoint(source)
    shape = find_moe_shape(checkpoint.config, str(source / "config.json"), checkpoint.shapes)
    check_experts(checkpoint, shape)
    check_destination(destination, source)
    check_room(destination, checkpoint.num_bytes)
    experts = expected_experts(shape)
    rounding = round_to_fp8 if to == "fp8" else round_to_int4
    names = sorted(checkpoint.tensors)
    rounded = [
        TensorLayout(name, "BF16", info.shape, 2 * math.prod(info.shape))
        if name in experts
        else TensorLayout.copy_of(name, info)
        for name, info in ((name, checkpoint.tensors[name]) for name in names)
    ]
    (shards,) = lay_out_shards([rounded], DEFAULT_SHARD_SIZE)
    with new_checkpoint(destination) as writer:
        with ShardWriter(writer.directory, shards) as file:
            for name in names:
                tensor = checkpoint.read([name])[name]
                file.write(name, rounding(tensor) if name in experts else tensor)
        writer.add_index(shards)
        writer.add_json("config.json", checkpoint.raw_config)
        writer.add_copies(checkpoint.path, checkpoint.other_files())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.round_to_nearest")
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("destination", type=Path, metavar="DEST")
    parser.add_argument("--to", choices=("fp8", "int4"), required=True)
    arguments = parser.parse_args()
    try:
        round_experts(arguments.source, arguments.destination, arguments.to)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
