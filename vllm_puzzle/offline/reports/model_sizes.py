"""How large a model's parts are on disk, from its config and the safetensors headers or index: no tensor is read."""

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from vllm_puzzle.format import INDEX_FILE

from ..checkpoints.checkpoint import HUB_ID, read_weight_map
from ..checkpoints.dense import build_model, check_dense
from ..checkpoints.expert_tensors import check_expert_places, check_experts, expected_experts, layer_names
from ..checkpoints.fp8 import SCALE_SUFFIX, block_size, scaled_bytes
from ..checkpoints.model_config import read_config, read_json, text_config
from ..checkpoints.servable import check_servable
from ..checkpoints.shape import MoEShape, find_moe_shape
from ..checkpoints.source import SourceCheckpoint
from ..errors import CheckpointError


@dataclass(frozen=True)
class ModelSizes:
    """A source model as `sizing` takes it.

    `expert_bytes` are the routed experts' on disk, `other_bytes` everything else's; the `plain` ones are what the
    converter reads them as, which differs where they are FP8. `read_from` says whether the tensors' own headers gave
    them, or the index's total and the config.
    """

    model: str
    config: Any
    shape: MoEShape
    expert_bytes: int
    other_bytes: int
    plain_expert_bytes: int
    plain_other_bytes: int
    read_from: Literal["headers", "index"]


def read_model_sizes(model: str) -> ModelSizes:
    """The sizes of a model in a folder, or on the hub as `org/name` where there is no such folder.

    A folder needs config.json and either every shard or the index alone. From the hub those two files are fetched.

    Raises:
        CheckpointError: neither folder nor hub id, the hub cannot be reached, or not a model that can be packed.
    """
    directory = Path(model) if os.path.exists(model) else _fetch(model)
    where = directory / "config.json"
    config = read_config(directory)
    block = block_size(read_json(where), Path(model))
    index = directory / INDEX_FILE
    if index.is_file():
        weight_map = read_weight_map(index, "copy or download it again")
        if not all((directory / shard).is_file() for shard in set(weight_map.values())):
            shape = find_moe_shape(config, str(where), dict.fromkeys(weight_map))
            check_servable(text_config(config), shape, str(where))
            return _from_index(model, index, set(weight_map), config, shape, block)
    checkpoint = SourceCheckpoint(directory)
    shape = checkpoint.shape
    check_servable(text_config(config), shape, str(where))
    check_experts(checkpoint, shape)
    check_dense(
        checkpoint.shapes, build_model(config, directory / "config.json"), shape, model, "download the checkpoint again"
    )
    experts = [checkpoint.tensors[name] for name in expected_experts(shape)]
    expert_bytes, plain = sum(each.num_bytes for each in experts), sum(each.plain_bytes for each in experts)
    other_bytes, plain_other = checkpoint.num_bytes - expert_bytes, checkpoint.plain_bytes - plain
    return ModelSizes(model, text_config(config), shape, expert_bytes, other_bytes, plain, plain_other, "headers")


def _from_index(
    model: str, index: Path, names: set[str], config: Any, shape: MoEShape, block: tuple[int, int] | None
) -> ModelSizes:
    metadata = read_json(index).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not isinstance(total, int | float):
        raise CheckpointError(f"{index} has no `metadata.total_size`; put the checkpoint's shards beside it")
    experts = expected_experts(shape)
    lacking = sorted(experts.keys() - names - _fused_experts(names, shape))
    if lacking:
        raise CheckpointError(
            f"{index} lacks {len(lacking)} of {len(experts)} expert tensors that config.json implies, the first is "
            f"{lacking[0]}; the two are not of one checkpoint, so copy or download both again"
        )
    on_hub = dict.fromkeys(shape.hub_name(name) for name in names)
    check_expert_places(on_hub, shape, str(index))
    check_dense(on_hub, build_model(config, index.parent / "config.json"), shape, index, "download it again")
    text = text_config(config)
    dtype: Any = config.dtype or text.dtype or torch.bfloat16
    plain = sum(rows * columns for rows, columns in experts.values()) * dtype.itemsize
    fp8 = {name.removesuffix(SCALE_SUFFIX) for name in names if name.endswith(SCALE_SUFFIX)} if block else set()
    expert_bytes = sum(
        scaled_bytes(size, block) if block and name in fp8 else math.prod(size) * dtype.itemsize
        for name, size in experts.items()
    )
    other_bytes = int(total) - expert_bytes
    if other_bytes < 0:
        raise CheckpointError(
            f"{index} has a total_size of {int(total):,} bytes, but the experts alone are {expert_bytes:,} in {dtype}; "
            f"put the checkpoint's shards beside it"
        )
    plain_other = other_bytes
    if fp8 - experts.keys():
        # Embeddings and routers are never FP8; all else is taken to be, which is right but for norms and the like.
        rows = (1 if text.tie_word_embeddings else 2) * text.vocab_size + len(shape.moe_layers) * shape.num_experts
        exact = min(other_bytes, rows * shape.hidden_size * dtype.itemsize)
        plain_other = exact + (other_bytes - exact) * dtype.itemsize
    return ModelSizes(model, text, shape, expert_bytes, other_bytes, plain, plain_other, "index")


def _fused_experts(names: set[str], shape: MoEShape) -> set[str]:
    """The names of the matrices that lie in three-dimensional tensors among `names`."""
    found: set[str] = set()
    for layer in shape.moe_layers:
        prefix = shape.block_prefix(layer)
        if any({prefix + fused.gate_up, prefix + fused.down} <= names for fused in shape.family.fused):
            found.update(name for expert in layer_names(shape, layer) for name in expert)
    return found


def _fetch(model: str) -> Path:
    """The folder of the hub's cache that config.json and the index of `model` are in."""
    if not HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model} does not exist; give the folder of a checkpoint or a hub id like org/name")
    # It warns of every retry, and whoever has no network is told so once, below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        config = hf_hub_download(model, "config.json")
        hf_hub_download(model, INDEX_FILE)
    except RemoteEntryNotFoundError as error:
        raise CheckpointError(
            f"{model} is not in this folder, and on the hub it lacks config.json or {INDEX_FILE} ({_flat(error)}); "
            f"download it and give its folder"
        ) from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{model} is not a folder here, and the Hugging Face hub cannot be reached for its config.json and "
            f"{INDEX_FILE} (no network, or HF_HUB_OFFLINE is set); give the folder of a checkpoint"
        ) from None
    except Exception as error:
        # The hub's client lets some errors of its HTTP library through, which changes with its version.
        raise CheckpointError(
            f"{model} is not a folder here, and the Hugging Face hub does not give its config.json and {INDEX_FILE}: "
            f"{_flat(error)}"
        ) from None
    return Path(config).parent


def _flat(error: Exception) -> str:
    return " ".join(str(error).split())
