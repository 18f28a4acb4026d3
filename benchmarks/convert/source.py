"""Synthetic checkpoints in the layout of Mixtral, of any size."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_puzzle.offline.checkpoints.shards import ShardWriter, TensorLayout, lay_out_shards
from vllm_puzzle.offline.checkpoints.writer import CheckpointWriter
from vllm_puzzle.offline.defaults import DEFAULT_SHARD_SIZE

_PROJECTIONS = ("w1", "w2", "w3")


@dataclass(frozen=True)
class MixtralSizes:
    """The sizes of a Mixtral whose attention and embeddings are as small as possible: nearly all of it is experts."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_local_experts: int = 8

    @property
    def layer_expert_bytes(self) -> int:
        """One layer's experts in BF16."""
        return 2 * 3 * self.num_local_experts * self.hidden_size * self.intermediate_size

    @property
    def config(self) -> dict[str, object]:
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_local_experts": self.num_local_experts,
            "num_attention_heads": self.hidden_size // 64,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "num_experts_per_tok": 2,
            "vocab_size": 256,
            "max_position_embeddings": 2048,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape, layer after layer."""
        hidden, inner = self.hidden_size, self.intermediate_size
        yield "model.embed_tokens.weight", (256, hidden)
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            for name, rows in (("q", hidden), ("k", 64), ("v", 64)):
                yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{prefix}self_attn.o_proj.weight", (hidden, hidden)
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"{prefix}{name}.weight", (hidden,)
            block = f"{prefix}block_sparse_moe."
            yield f"{block}gate.weight", (self.num_local_experts, hidden)
            for expert in range(self.num_local_experts):
                for projection in _PROJECTIONS:
                    size = (hidden, inner) if projection == "w2" else (inner, hidden)
                    yield f"{block}experts.{expert}.{projection}.weight", size
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (256, hidden)


def write_source(path: Path, sizes: MixtralSizes, shard_size: int = DEFAULT_SHARD_SIZE) -> int:
    """Writes a checkpoint to the folder `path` and returns the bytes of its tensors.

    Every matrix is the same random numbers from another start on.
    """
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    tensors = [TensorLayout(name, "BF16", size, 2 * math.prod(size)) for name, size in sizes.tensors()]
    longest = max(tensor.num_bytes for tensor in tensors) // 2
    generator = torch.Generator().manual_seed(0)
    numbers = torch.empty(longest + len(tensors), dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    (shards,) = lay_out_shards([tensors], shard_size)
    with ShardWriter(path, shards) as file:
        for start, tensor in enumerate(tensors):
            file.write(tensor.name, numbers[start : start + tensor.num_bytes // 2].view(tensor.shape))
    writer = CheckpointWriter(path)
    writer.add_index(shards)
    (path / "config.json").write_text(json.dumps(sizes.config), encoding="utf-8")
    return sum(tensor.num_bytes for tensor in tensors)
