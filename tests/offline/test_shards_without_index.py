"""Safetensors files that no index lists: read as vLLM reads them, all of the folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.offline.faulty import assert_refused, snapshot
from tests.offline.planning import planned
from vllm_puzzle.cli import main
from vllm_puzzle.format import INDEX_FILE

pytestmark = pytest.mark.heavy


def split(source: Path, *files: str) -> None:
    """Deals the tensors of the single file out to `files`, without an index."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, file in enumerate(files):
        part = {name: tensors[name] for name in names[number :: len(files)]}
        save_file(part, source / file, {"format": "pt"})


@pytest.mark.parametrize(
    "files",
    [
        ["model-00001-of-00001.safetensors"],
        ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"],
        ["model.safetensors", "more.safetensors"],
    ],
    ids=len,
)
def test_every_command_reads_them(
    files: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, packed, plain = tmp_path / "whole", tmp_path / "packed", tmp_path / "plain"
    assert main(["convert", str(source), str(whole)]) == 0
    expected = planned(capsys, source)
    split(source, *files)
    assert planned(capsys, source) == expected
    assert main(["convert", str(source), str(packed)]) == 0
    same = {name: sha for name, sha in snapshot(whole).items() if name != "README.md"}
    assert {name: sha for name, sha in snapshot(packed).items() if name != "README.md"} == same
    # A packed folder may have lost its index too.
    (packed / INDEX_FILE).unlink()
    assert main(["verify", str(source), str(packed)]) == 0
    assert main(["inspect", str(packed)]) == 0
    assert main(["unpack", str(packed), str(plain)]) == 0


def test_a_tensor_in_two_files(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"lm_head.weight": torch.zeros(3)}, source / "adapter.safetensors", {"format": "pt"})
    arguments = ["convert", str(source), str(tmp_path / "packed")]
    assert_refused(
        arguments, tmp_path, capsys, "lm_head.weight is in adapter.safetensors and in model.safetensors", INDEX_FILE
    )


def test_a_file_that_its_siblings_count(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What lies in it may be no expert, which nobody would miss until the model is served."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    tensors.pop("lm_head.weight")
    save_file(tensors, source / "model-00001-of-00002.safetensors", {"format": "pt"})
    arguments = ["convert", str(source), str(tmp_path / "packed")]
    missing = source / "model-00002-of-00002.safetensors"
    assert_refused(arguments, tmp_path, capsys, f"{missing} is missing", "model-00001-of-00002.safetensors counts it")


def test_the_same_weights_in_another_layout_are_left_out(source: Path, tmp_path: Path) -> None:
    save_file({"layers.0.attention.wq.weight": torch.zeros(3)}, source / "consolidated.safetensors")
    assert main(["convert", str(source), str(tmp_path / "packed"), "--rule", "paper"]) == 0
    index = json.loads((tmp_path / "packed" / INDEX_FILE).read_text())
    assert "layers.0.attention.wq.weight" not in index["weight_map"]


def test_downloading_again_is_advised_of_damaged_sources_only(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    assert main(["convert", str(source), str(packed), "--rule", "paper"]) == 0
    for path, part, other in ((packed, "convert its source again", "download"), (source, "download", "convert")):
        file = max(path.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1])
        capsys.readouterr()
        assert main(["verify", str(source), str(packed)] if path == source else ["inspect", str(packed)]) == 1
        error = capsys.readouterr().err
        assert "not a whole safetensors file" in error
        assert part in error.split(";")[-1]
        assert other not in error.split(";")[-1]
