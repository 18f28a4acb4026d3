"""A user's mistake: one sentence, a non-zero exit, and source and destination as they were."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import build_tiny
from vllm_puzzle.cli import main

EXPERT = "model.layers.1.block_sparse_moe.experts.5.w3.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build_tiny("mixtral", tmp_path / "source")


def snapshot(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def assert_refused(arguments: list[str], root: Path, capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """The command fails with one sentence that has all of `parts`, and nothing under `root` has changed."""
    before = snapshot(root)
    capsys.readouterr()
    assert main(arguments) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    # What was announced on the way comes before it.
    message = lines[-1]
    assert message.startswith("error: ")
    assert all(line.startswith("no calibration text was given") for line in lines[:-1])
    for part in parts:
        assert part in message, message
    assert snapshot(root) == before


def edit_config(source: Path, **changes: object) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(source: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


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
        ("config.json", "LlamaForCausalLM", "MixtralForCausalLM"),
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
    ("options", "parts"),
    [
        (["--tau", "1.5"], ("--tau 1.5",)),
        (["--compression", "60"], ("--compression 60", "50 is the most")),
        (["--max-expert-parallel", "3"], ("--max-expert-parallel 3", "8 experts")),
        (["--max-expert-parallel", "0"], ("--max-expert-parallel 0",)),
        (["--calibration-sequences", "0", "--calibration", "x"], ("--calibration-sequences 0",)),
        (["--calibration", "nowhere.txt"], ("nowhere.txt does not exist",)),
    ],
)
def test_a_wrong_option(
    options: list[str], parts: tuple[str, ...], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(["convert", str(source), str(tmp_path / "packed"), *options], tmp_path, capsys, *parts)


@pytest.mark.parametrize(("content", "part"), [(b"", "has 0 tokens"), (b"\xff\xfe\x00\x01", "cannot be read as UTF-8")])
def test_an_unusable_calibration_text(
    content: bytes, part: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_bytes(content)
    arguments = ["convert", str(source), str(tmp_path / "packed"), "--calibration", str(text)]
    assert_refused(arguments, tmp_path, capsys, part)


def test_calibration_without_a_tokenizer(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "tokenizer.json").unlink()
    text = tmp_path / "text"
    text.write_text("some words " * 50)
    arguments = ["convert", str(source), str(tmp_path / "packed"), "--calibration", str(text)]
    assert_refused(arguments, tmp_path, capsys, "has no tokenizer")


def test_destinations(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("precious")
    assert_refused(["convert", str(source), str(tmp_path / "there")], tmp_path, capsys, "exists already")
    assert_refused(["convert", str(source), str(tmp_path / "no" / "packed")], tmp_path, capsys, "no does not exist")
    assert_refused(["convert", str(tmp_path / "none"), str(tmp_path / "p")], tmp_path, capsys, "is not a directory")


def test_a_disk_without_room(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert_refused(["convert", str(source), str(tmp_path / "packed")], tmp_path, capsys, "needs", "0.000 GB free")


def test_a_disk_that_fills_up_on_the_way(source: Path, tmp_path: Path) -> None:
    """A file size limit stands in for it: the kernel refuses a write in the middle of a shard."""
    before = snapshot(tmp_path)
    program = (
        "import resource, signal, sys; from vllm_puzzle.cli import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); "
        f"sys.exit(main(['convert', {str(source)!r}, {str(tmp_path / 'packed')!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path / 'packed'} could not be written (")
    assert "Traceback" not in result.stderr
    assert snapshot(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_verify_finds_what_was_changed(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "packed"
    assert main(["convert", str(source), str(packed)]) == 0
    file = packed / "model-00003-of-00004.safetensors"
    name = "model.layers.1.self_attn.q_proj.weight"
    original = load_file(file)

    def spoil(change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        tensors = {key: value.clone() for key, value in original.items()}
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    word = next(key for key in original if key.endswith("weight_packed"))
    # Each change is the smallest of its kind: a bit, an illegal word, a flipped sign.
    spoil(lambda tensors: tensors[name].view(torch.int16)[2].__setitem__(3, tensors[name].view(torch.int16)[2, 3] ^ 1))
    assert_refused(["verify", str(source), str(packed)], tmp_path, capsys, name, "differs")
    spoil(lambda tensors: tensors[word][0].__setitem__(0, 0x0001))
    assert_refused(["verify", str(source), str(packed)], tmp_path, capsys, f"{word}[0, 0]", "never written")
    spoil(lambda tensors: tensors[word][1].__setitem__(2, tensors[word][1, 2] ^ 1))
    assert_refused(["verify", str(source), str(packed)], tmp_path, capsys, f"{word}[1, 2]", "cannot make")
    spoil(lambda tensors: tensors.pop(word))
    assert main(["verify", str(source), str(packed)]) == 1


def test_unpack_and_verify_want_a_packed_checkpoint(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["unpack", str(source), str(tmp_path / "plain")], ["verify", str(source), str(source)]):
        assert_refused(arguments, tmp_path, capsys, "no quantization_config", "not packed")


def test_the_command_line_of_a_shell(source: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)

    done = run("vllm_puzzle.convert", str(source), str(tmp_path / "packed"))
    assert done.returncode == 0
    assert done.stdout.startswith(f"{tmp_path / 'packed'}: experts 552,960 -> 276,480 bytes")
    # Not a terminal: no progress bar, only what had to be announced.
    assert done.stderr == "no calibration text was given: experts are weighed by the magnitude of their weights alone\n"
    again = run("vllm_puzzle.convert", str(source), str(tmp_path / "packed"))
    assert again.returncode == 1
    assert again.stderr == f"error: {tmp_path / 'packed'} exists already; choose another name or remove it\n"
    usage = run("vllm_puzzle.convert", str(source), str(tmp_path / "other"), "--rule", "magic")
    assert usage.returncode == 2
    assert "Traceback" not in usage.stderr
