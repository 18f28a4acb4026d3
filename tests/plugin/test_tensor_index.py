"""A packed folder that lacks something is refused before vLLM allocates anything: it would serve it uninitialised."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from vllm.transformers_utils.config import get_config

from tests.plugin.checkpoints import INDEX, SHARD
from tests.plugin.engine import running
from tests.tiny import FAMILIES, add_mtp_layer, build_tiny, first_of_each_kind, remove_tensors
from vllm_puzzle.cli import main
from vllm_puzzle.format import FormatError
from vllm_puzzle.plugin.config import PuzzleMoEConfig

# Their layers for multi-token prediction.
DRAFTING = {"deepseek_v3": "model.layers.3.", "glm4_moe": "model.layers.3.", "qwen3_next": "mtp.layers.0."}


def ask(model: Path | str, config_of: Path) -> None:
    """What vLLM asks of a model's quantization before it builds the model."""
    hf_config = get_config(config_of, trust_remote_code=False)
    PuzzleMoEConfig.from_config(hf_config.quantization_config).maybe_update_config(str(model), hf_config=hf_config)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.block_sparse_moe.gate.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
    ],
)
def test_it_is_not_served_without(name: str, copy: Path) -> None:
    remove_tensors(copy, {name})
    with pytest.raises(ValueError, match=f"lacks 1 tensor .*: {name}; copy or convert"), running(copy):
        pass


@pytest.mark.parametrize(
    "name", ["1.{}.experts.0.w2.weight_codebook", "1.{}.experts.3.w3.weight_scale", "2.{}.experts.5.w2.weight"]
)
def test_a_tensor_of_a_coded_or_a_plain_expert_is_missed(name: str, mixed_copy: Path) -> None:
    """Of a plain one vLLM would serve what its memory held before."""
    ask(mixed_copy, mixed_copy)
    lost = f"model.layers.{name.format('block_sparse_moe')}"
    remove_tensors(mixed_copy, {lost})
    with pytest.raises(FormatError, match=rf"{lost}( is missing)?; copy or convert"):
        ask(mixed_copy, mixed_copy)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_is_missed(family: str, tmp_path: Path) -> None:
    source, packed = build_tiny(family, tmp_path / "source"), tmp_path / "packed"
    kinds = first_of_each_kind(load_file(source / "model.safetensors"))
    if family in DRAFTING:
        add_mtp_layer(source, DRAFTING[family])
    assert main(["convert", str(source), str(packed), "--rule", "paper"]) == 0
    ask(packed, packed)
    remove_tensors(packed, kinds)
    with pytest.raises(FormatError, match=rf"lacks {len(kinds)} tensors .* and {len(kinds) - 4} more; copy"):
        ask(packed, packed)


def test_another_shape(copy: Path) -> None:
    tensors = load_file(copy / SHARD)
    name = "model.layers.1.block_sparse_moe.gate.weight"
    save_file({**tensors, name: tensors[name][:7].contiguous()}, copy / SHARD, {"format": "pt"})
    with pytest.raises(FormatError, match=rf"{name} \[7, 96\] for \[8, 96\]"):
        ask(copy, copy)


def write(content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / INDEX).write_bytes(content) and None


def drop_names(path: Path) -> None:
    index = json.loads((path / INDEX).read_text())
    (path / INDEX).write_text(json.dumps({**index, "weight_map": list(index["weight_map"])}))


def truncate(path: Path) -> None:
    os.truncate(path / SHARD, 5000)


def lose_a_tensor(path: Path) -> None:
    """Of which the index goes on telling."""
    tensors = load_file(path / SHARD)
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, path / SHARD, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (write(b'{"weight_map": {'), f"{INDEX} cannot be read as JSON"),
        (write(b"\xff\xfe{}"), f"{INDEX} cannot be read as JSON"),
        (write(b"[]"), f"{INDEX} has no `weight_map`"),
        (write(b"{}"), f"{INDEX} has no `weight_map`"),
        (write(b'{"weight_map": {"lm_head.weight": 3}}'), f"{INDEX} has no `weight_map`"),
        (drop_names, f"{INDEX} has no `weight_map`"),
        (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing, and [0-9]+ tensors"),
        (truncate, f"{SHARD} is not a whole safetensors file"),
        (lambda path: (path / SHARD).write_bytes(b""), f"{SHARD} is not a whole safetensors file"),
        (lambda path: (path / SHARD).write_bytes(struct.pack("<Q", 9) + b"{}"), f"{SHARD} is not a whole safetensors"),
        (lose_a_tensor, f"{SHARD} lacks 1 of the tensors .* model.layers.1.input_layernorm.weight"),
    ],
)
def test_a_broken_index_or_shard(spoil: Callable[[Path], object], message: str, copy: Path) -> None:
    spoil(copy)
    with pytest.raises(FormatError, match=message):
        ask(copy, copy)


def test_vllm_says_it_so(copy: Path) -> None:
    (copy / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="has no `weight_map`"), running(copy):
        pass


def test_files_beside_the_index_are_no_part_of_it(copy: Path) -> None:
    """As vLLM, which leaves them out."""
    (copy / "other.safetensors").write_bytes(b"not one")
    ask(copy, copy)


def test_without_an_index_every_file_counts(copy: Path) -> None:
    (copy / INDEX).unlink()
    ask(copy, copy)
    (copy / "model-00004-of-00004.safetensors").unlink()
    with pytest.raises(FormatError, match="is missing"):
        ask(copy, copy)


def test_of_the_hub_the_index_is_read(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is in the hub's cache, no network is needed."""
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--someone--packed"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    index = json.loads((copy / INDEX).read_text())
    (snapshot / INDEX).write_text(json.dumps(index))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    ask("someone/packed", copy)
    del index["weight_map"]["model.layers.1.input_layernorm.weight"]
    (snapshot / INDEX).write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"someone/packed lacks 1 tensor .*layers\.1\.input_layernorm"):
        ask("someone/packed", copy)
