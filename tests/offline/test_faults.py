"""A faulty source: one sentence, a non-zero exit, and source and destination as they were."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.offline.faulty import EXPERT, assert_refused, edit_config, edit_tensors, snapshot
from vllm_puzzle.cli import main


def shard(source: Path) -> None:
    """Splits the single file into two shards with an index."""
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, source / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_index(source: Path, **weight_map: str) -> None:
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"].update(weight_map)
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0xFF
    file.write_bytes(content)


def double(source: Path) -> None:
    """A tensor of the first shard in the second too."""
    file = source / "model-00002-of-00002.safetensors"
    save_file({**load_file(file), "lm_head.weight": torch.zeros(3)}, file, {"format": "pt"})


def test_a_sharded_source_converts_to_the_same_experts(source: Path, tmp_path: Path) -> None:
    assert main(["convert", str(source), str(tmp_path / "whole")]) == 0
    shard(source)
    assert main(["convert", str(source), str(tmp_path / "sharded")]) == 0
    assert snapshot(tmp_path / "whole") == {
        **snapshot(tmp_path / "sharded"),
        # The card names its own folder.
        "README.md": snapshot(tmp_path / "whole")["README.md"],
    }


FAULTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "unsupported architecture": (
        lambda source: edit_config(source, architectures=["LlamaForCausalLM"]),
        ("config.json", "LlamaForCausalLM", "no Mixture of Experts"),
    ),
    "already quantized": (
        lambda source: edit_config(source, quantization_config={"quant_method": "fp8"}),
        ("already quantized (fp8)",),
    ),
    "unknown model type": (
        lambda source: edit_config(source, model_type="brandnew"),
        ("transformers cannot read", "brandnew"),
    ),
    "config is not JSON": (
        lambda source: (source / "config.json").write_text("{"),
        ("config.json cannot be read as JSON",),
    ),
    "config is missing": (lambda source: (source / "config.json").unlink(), ("config.json is missing",)),
    "no safetensors": (
        lambda source: (source / "model.safetensors").rename(source / "pytorch_model.bin"),
        ("only safetensors",),
    ),
    "truncated file": (
        lambda source: (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-100]),
        ("model.safetensors is not a whole safetensors file",),
    ),
    "broken header": (
        lambda source: (source / "model.safetensors").write_bytes(b"\xff" * 64),
        ("model.safetensors is not a whole safetensors file",),
    ),
    "missing expert tensor": (
        lambda source: edit_tensors(source, lambda tensors: tensors.pop(EXPERT)),
        (f"{EXPERT} is missing",),
    ),
    "wrong shape": (
        lambda source: edit_tensors(source, lambda tensors: tensors.update({EXPERT: torch.zeros(40, 95)})),
        (EXPERT, "[40, 95]", "[40, 96]"),
    ),
    "integer experts": (
        lambda source: edit_tensors(
            source, lambda tensors: tensors.update({EXPERT: torch.zeros(40, 96, dtype=torch.int8)})
        ),
        (EXPERT, "I8", "dequantize"),
    ),
    "unmatched expert tensor": (
        lambda source: edit_tensors(
            source, lambda tensors: tensors.update({EXPERT.replace("weight", "bias"): torch.zeros(40)})
        ),
        (EXPERT.replace("weight", "bias"),),
    ),
    "more experts than the config": (lambda source: edit_config(source, num_local_experts=6), ("experts.6.w1.weight",)),
    "NaN in an expert": (
        lambda source: edit_tensors(source, lambda tensors: tensors[EXPERT][3].__setitem__(7, torch.nan)),
        (f"{EXPERT}[3, 7] is nan",),
    ),
    "weight too large": (
        lambda source: edit_tensors(source, lambda tensors: tensors[EXPERT][39].__setitem__(95, -1e6)),
        (f"{EXPERT}[39, 95] is -", "65280"),
    ),
    "missing shard": (
        lambda source: (shard(source), (source / "model-00002-of-00002.safetensors").unlink()),
        ("model-00002-of-00002.safetensors is missing",),
    ),
    "shard outside the directory": (
        lambda source: (shard(source), edit_index(source, x="../x.safetensors")),
        ("outside its own directory", "../x.safetensors"),
    ),
    "truncated shard": (
        lambda source: (shard(source), truncate(source / "model-00002-of-00002.safetensors")),
        ("model-00002-of-00002.safetensors is not a whole safetensors file",),
    ),
    "a flipped byte in a header": (
        lambda source: (shard(source), flip(source / "model-00001-of-00002.safetensors", 8)),
        ("model-00001-of-00002.safetensors is not a whole safetensors file",),
    ),
    "a tensor in two shards": (
        lambda source: (shard(source), double(source)),
        ("model-00002-of-00002.safetensors: tensor lm_head.weight is not in model.safetensors.index.json",),
    ),
    "pickled weights": (
        lambda source: ((source / "model.safetensors").unlink(), torch.save({}, source / "pytorch_model.bin")),
        ("only safetensors",),
    ),
    "index names a tensor that is not there": (
        lambda source: (shard(source), edit_index(source, x="model-00001-of-00002.safetensors")),
        ("tensor x is not in the file",),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_source(fault: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, parts = FAULTS[fault]
    spoil(source)
    assert_refused(["convert", str(source), str(tmp_path / "packed")], tmp_path, capsys, *parts)


@pytest.mark.parametrize(
    "options",
    [
        ["--rule", "paper"],
        ["--rule", "saliency", "--align", "--pairing", "coactivation"],
        ["--rule", "compensated", "--pairing", "loss"],
    ],
)
def test_a_faulty_expert_under_calibration(
    options: list[str], source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokens meet the fault before the merging does, and carry it through the layers after."""
    options = [*options, "--calibration", str(text), "--calibration-sequences", "1"]
    for value, part in ((torch.nan, "is nan"), (1e30, "65280")):
        edit_tensors(source, lambda tensors, value=value: tensors[EXPERT][3].__setitem__(7, value))
        arguments = ["convert", str(source), str(tmp_path / "packed"), *options]
        assert_refused(arguments, tmp_path, capsys, f"{EXPERT}[3, 7]", part)


@pytest.mark.parametrize("options", [["--rule", "saliency", "--align"], ["--rule", "compensated", "--no-align"]])
def test_calibration_through_a_model_that_answers_nan(
    options: list[str], source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_tensors(source, lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"][0].__setitem__(0, torch.nan))
    arguments = ["convert", str(source), str(tmp_path / "packed"), "--calibration", str(text), *options]
    assert_refused(arguments, tmp_path, capsys)


def test_unpack_and_verify_want_a_packed_checkpoint(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["unpack", str(source), str(tmp_path / "plain")], ["verify", str(source), str(source)]):
        assert_refused(arguments, tmp_path, capsys, "no quantization_config", "not packed")
