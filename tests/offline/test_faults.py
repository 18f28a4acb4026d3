"""A user's mistake: one sentence, a non-zero exit, and source and destination as they were."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.offline.faulty import EXPERT, assert_refused, edit_config, edit_tensors, snapshot
from vllm_puzzle.cli import main
from vllm_puzzle.offline.checkpoints.shards import ShardPlan
from vllm_puzzle.offline.checkpoints.writer import CheckpointWriter


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


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--tau", "1.5"], ("--tau 1.5",)),
        (["--compression", "60"], ("--compression 60", "50 is the most")),
        (["--max-expert-parallel", "3"], ("--max-expert-parallel 3", "8 experts")),
        (["--max-expert-parallel", "0"], ("--max-expert-parallel 0",)),
        (["--calibration-sequences", "0", "--calibration", "x"], ("--calibration-sequences 0",)),
        (["--calibration", "nowhere.txt"], ("nowhere.txt does not exist",)),
        (["--rule", "compensated"], ("--rule compensated needs to see tokens", "--calibration FILE")),
        (["--pairing", "coactivation"], ("--pairing coactivation needs to see tokens", "--calibration FILE")),
        (["--rule", "paper", "--align"], ("--rule paper", "leave out --align")),
        (["--device", "tpu"], ("--device tpu", "cpu or cuda")),
        (["--device", "meta"], ("--device meta",)),
        (["--device", "cuda"], ("--device cuda", "give cpu")),
        (["--device", "cuda:1"], ("--device cuda:1", "give cpu")),
    ],
)
def test_a_wrong_option(
    options: list[str],
    parts: tuple[str, ...],
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
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


@pytest.mark.parametrize("command", ["convert", "unpack"])
def test_destinations_that_cannot_be_made(
    command: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found before anything is read, let alone merged."""
    (tmp_path / "file").write_text("mine")
    for name, parts in (
        (os.fsdecode(b"sorti\xe9"), ("is not UTF-8", "a byte 0xe9 in", "choose another name")),
        (os.fsdecode(b"a\xe9/packed"), ("is not UTF-8",)),
        ("n" * 256, ("is 256 bytes long", "237")),
        ("\N{SNOWMAN}" * 80, ("is 240 bytes long", "237")),
        ("file/packed", (f"{tmp_path / 'file'} is no folder",)),
        ("file/in/packed", (f"{tmp_path / 'file' / 'in'} does not exist",)),
        (f"{'d' * 300}/packed", ("does not exist",)),
    ):
        assert_refused([command, str(source), str(tmp_path / name)], tmp_path, capsys, *parts)


def test_a_path_without_room_for_files(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each name in it is short enough, and so is the folder's own path, but not those of its shards."""
    deep = tmp_path
    while len(str(deep)) < 4096 - 300:
        deep /= "d" * min(200, 4096 - 280 - len(str(deep)))
    deep.mkdir(parents=True)
    packed = deep / ("p" * (4096 - 60 - len(str(deep))))
    assert_refused(["convert", str(source), str(packed)], tmp_path, capsys, "bytes long, which is too long")


@pytest.mark.parametrize("command", ["convert", "plan", "inspect", "unpack", "verify"])
def test_a_source_whose_name_is_too_long(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"convert": ["new"], "unpack": ["new"], "verify": ["s" * 300]}.get(command, [])
    arguments = [command, str(tmp_path / ("s" * 300)), *(str(tmp_path / name) for name in more)]
    assert_refused(arguments, tmp_path, capsys, "give the folder")


def test_a_destination_that_is_made_meanwhile(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By somebody else, while hours go by: nothing of the work is lost."""
    packed = tmp_path / "packed"
    add_index = CheckpointWriter.add_index

    def make_destination(writer: CheckpointWriter, shards: Sequence[ShardPlan]) -> None:
        add_index(writer, shards)
        packed.mkdir()
        (packed / "mine.txt").write_text("precious")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "add_index", make_destination)
        assert main(["convert", str(source), str(packed)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "was made meanwhile" in error
    assert "--resume" in error
    assert (packed / "mine.txt").read_text() == "precious"
    packed.rename(tmp_path / "theirs")
    assert main(["convert", str(source), str(packed), "--resume"]) == 0
    assert main(["verify", str(source), str(packed)]) == 0


def test_a_disk_without_room(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert_refused(
        ["convert", str(source), str(tmp_path / "packed")],
        tmp_path,
        capsys,
        "needs 806 kB and its disk has 1.00 kB free",
    )


def test_a_disk_that_fills_up_on_the_way(source: Path, tmp_path: Path) -> None:
    """A file size limit stands in for it: the kernel refuses a write in the middle of a shard."""
    program = (
        "import resource, signal, sys; from vllm_puzzle.cli import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); "
        f"sys.exit(main(['convert', {str(source)!r}, {str(tmp_path / 'packed')!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path / 'packed'} could not be written (")
    assert "Traceback" not in result.stderr
    # Nothing under the final name, and what is whole is not lost.
    assert not (tmp_path / "packed").exists()
    assert "--resume" in result.stderr
    arguments = ["convert", str(source), str(tmp_path / "packed")]
    assert main([*arguments, "--resume"]) == 0
    packed = snapshot(tmp_path / "packed")
    (tmp_path / "packed").rename(tmp_path / "other")
    assert main(arguments) == 0
    assert snapshot(tmp_path / "packed") == packed


def test_a_destination_that_may_not_be_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert_refused(["convert", str(source), str(tmp_path / "packed")], tmp_path, capsys, "is not writable")


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
    assert done.stdout.startswith(f"{tmp_path / 'packed'}: experts 553 kB -> 276 kB, checkpoint 806 kB -> 529 kB, ")
    # Not a terminal: no progress bar, only what had to be announced.
    first, cost, pairing = done.stderr.splitlines()
    assert first == "no calibration text was given: experts are weighed by the magnitude of their weights alone"
    assert re.fullmatch(
        r"rule saliency with aligned neurons on cpu: about \d+ seconds \([\d.]+ minutes a billion weights\), "
        r"\d+ MB of memory",
        cost,
    )
    assert pairing == "pairing random: 12 pairs, 4 to 4 a layer"
    again = run("vllm_puzzle.convert", str(source), str(tmp_path / "packed"))
    assert again.returncode == 1
    assert again.stderr == f"error: {tmp_path / 'packed'} exists already; choose another name or remove it\n"
    usage = run("vllm_puzzle.convert", str(source), str(tmp_path / "other"), "--rule", "magic")
    assert usage.returncode == 2
    assert "Traceback" not in usage.stderr
