"""What a checkpoint has beside its experts: the commands want all of it that the model needs, in its shape."""

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.offline.faulty import assert_refused, edit_config, edit_tensors
from tests.tiny import FAMILIES, build_tiny, first_of_each_kind, remove_tensors
from vllm_puzzle.cli import main

NORM = "model.layers.1.input_layernorm.weight"
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"


def remove(names: set[str], tensors: dict[str, torch.Tensor]) -> None:
    for name in names:
        del tensors[name]


@pytest.mark.parametrize("original", [True, False], ids=["hub", "own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_tensor_is_needed(
    family: str, original: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its name on the hub, in the layout of the hub and in that of transformers' own modules."""
    hub = build_tiny(family, tmp_path / "hub")
    source = build_tiny(family, tmp_path / "source", save={"save_original_format": original})
    kinds = first_of_each_kind(load_file(hub / "model.safetensors"))
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} < kinds
    stored = first_of_each_kind(load_file(source / "model.safetensors"))
    assert len(stored) == len(kinds)
    edit_tensors(source, lambda tensors: remove(stored, tensors))
    arguments = ["convert", str(source), str(tmp_path / "packed")]
    assert_refused(arguments, tmp_path, capsys, f"{source} lacks {len(kinds)} tensors", "download", " and ")


@pytest.mark.parametrize("name", ["lm_head.weight", NORM, ROUTER, "model.layers.0.self_attn.v_proj.weight"])
def test_a_missing_tensor_is_named(name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, parts = tmp_path / "packed", ("lacks 1 tensor that", name)
    assert main(["convert", str(source), str(packed), "--rule", "paper"]) == 0
    remove_tensors(packed, {name})
    for command in (["verify", str(source), str(packed)], ["unpack", str(packed), str(tmp_path / "plain")]):
        assert_refused(command, tmp_path, capsys, str(packed), *parts, "copy or convert")
    assert_refused(["inspect", str(packed)], tmp_path, capsys, str(packed), *parts)
    edit_tensors(source, lambda tensors: remove({name}, tensors))
    for command in (["convert", str(source), str(tmp_path / "other")], ["plan", str(source)]):
        assert_refused(command, tmp_path, capsys, str(source), *parts, "download")


@pytest.mark.parametrize(("name", "size"), [(NORM, (95,)), (ROUTER, (7, 96)), ("lm_head.weight", (250, 96))])
def test_a_misshapen_tensor_is_named(
    name: str, size: tuple[int, ...], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_tensors(source, lambda tensors: tensors.update({name: torch.zeros(size)}))
    arguments = ["convert", str(source), str(tmp_path / "packed")]
    assert_refused(arguments, tmp_path, capsys, "1 tensor of another shape", f"{name} {list(size)} for [")


def test_plan_of_an_index_alone(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = list(load_file(source / "model.safetensors"))
    (source / "model.safetensors").unlink()
    index = source / "model.safetensors.index.json"
    content = {"metadata": {"total_size": 10**7}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    index.write_text(json.dumps(content))
    assert main(["plan", str(source)]) == 0
    del content["weight_map"][NORM]  # type: ignore[attr-defined]
    index.write_text(json.dumps(content))
    assert_refused(["plan", str(source)], tmp_path, capsys, str(index), "lacks 1 tensor", NORM)


@pytest.mark.parametrize("family", ["mixtral", "ernie4_5_moe"])
@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_may_be_left_out(family: str, stored: bool, tmp_path: Path) -> None:
    source, packed = build_tiny(family, tmp_path / "source", tie_word_embeddings=True), tmp_path / "packed"
    assert "lm_head.weight" not in load_file(source / "model.safetensors")
    if stored:
        edit_tensors(
            source, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
        )
    assert main(["convert", str(source), str(packed), "--rule", "paper"]) == 0
    assert main(["verify", str(source), str(packed)]) == 0


def test_what_no_tensor_depends_on_may_be_anything(source: Path, tmp_path: Path) -> None:
    """Converting without calibration runs no model."""
    edit_config(source, attn_implementation="flash_attention_2", experts_implementation="sonicmoe", pad_token_id=999)
    assert main(["convert", str(source), str(tmp_path / "packed"), "--rule", "paper"]) == 0


def test_a_model_that_transformers_cannot_build(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(source, rope_parameters={"rope_type": "hardly", "rope_theta": 1e4})
    arguments = ["convert", str(source), str(tmp_path / "packed")]
    assert_refused(arguments, tmp_path, capsys, "transformers cannot build the model of", "config.json", "hardly")


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_refuses_packed_experts(family: str, tmp_path: Path) -> None:
    """It would leave them at random, and say so in a warning."""
    source, packed, plain = build_tiny(family, tmp_path / "source"), tmp_path / "packed", tmp_path / "plain"
    assert main(["convert", str(source), str(packed), "--rule", "paper"]) == 0
    with pytest.raises(ValueError, match="puzzlemoe"):
        AutoModelForCausalLM.from_pretrained(packed)
    assert AutoConfig.from_pretrained(packed).vocab_size == 259
    assert AutoTokenizer.from_pretrained(packed).encode("a") == AutoTokenizer.from_pretrained(source).encode("a")
    assert main(["unpack", str(packed), str(plain)]) == 0
    assert json.loads((plain / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    _, report = AutoModelForCausalLM.from_pretrained(plain, output_loading_info=True)
    assert not report["missing_keys"]


def test_folders_from_before_transformers_was_told(source: Path, tmp_path: Path) -> None:
    packed, old = tmp_path / "packed", tmp_path / "old"
    edit_config(source, experts_implementation="eager")
    assert main(["convert", str(source), str(packed), "--rule", "paper"]) == 0
    copytree(packed, old)
    edit_config(old, experts_implementation="eager")
    assert main(["verify", str(source), str(old)]) == 0
    assert main(["inspect", str(old)]) == 0
    assert main(["unpack", str(old), str(tmp_path / "plain")]) == 0
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["experts_implementation"] == "eager"
