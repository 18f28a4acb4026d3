"""A conversion that is interrupted: what it leaves, and that resuming gives the bytes of one that was not."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.offline.faulty import edit_config, edit_tensors, snapshot
from tests.offline.interrupted import BreakAt, with_text
from tests.tiny import build_tiny
from vllm_puzzle.cli import main

BLIND = ["--rule", "paper"]
RECIPES = [
    BLIND,
    ["--rule", "saliency", "--pairing", "loss", "--compression", "25"],
    ["--rule", "saliency", "--calibration", "TEXT", "--calibration-sequences", "1"],
    ["--rule", "compensated", "--calibration", "TEXT", "--calibration-sequences", "1"],
]


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", RECIPES, ids=" ".join)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_resuming_gives_the_same_bytes(
    family: str, recipe: list[str], tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build_tiny(family, tmp_path / "source")
    options = with_text(recipe, text)
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    unbroken = BreakAt(None)
    with monkeypatch.context() as patch:
        unbroken.install(patch)
        assert main(["convert", str(source), str(tmp_path / "whole" / "packed"), *options]) == 0
    # In the middle of what is written, and again right after resuming.
    arguments = ["convert", str(source), str(tmp_path / "broken" / "packed"), *options]
    for number in (unbroken.writes // 2, 5, unbroken.writes // 4):
        with monkeypatch.context() as patch:
            BreakAt(number).install(patch)
            resumed = ["--resume"] if (tmp_path / "broken" / ".packed.partial").exists() else []
            assert main([*arguments, *resumed]) == 130
        assert not (tmp_path / "broken" / "packed").exists()
    assert main([*arguments, "--resume"]) == 0
    assert snapshot(tmp_path / "broken") == snapshot(tmp_path / "whole")


def break_off(source: Path, packed: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Path:
    """Leaves the work directory of a conversion that wrote a part of its layers."""
    with monkeypatch.context() as patch:
        BreakAt(50).install(patch)
        assert main(["convert", str(source), str(packed), *options]) == 130
    return packed.parent / f".{packed.name}.partial"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    for part in parts:
        assert part in error, error


CHANGES: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "an option": (lambda source: None, ["--rule", "paper", "--seed", "3"], "--seed"),
    "a rule": (lambda source: None, ["--rule", "saliency"], "--rule"),
    "the config": (lambda source: edit_config(source, rope_theta=3.0), BLIND, "config.json"),
    "the weights": (
        lambda source: edit_tensors(source, lambda tensors: tensors["lm_head.weight"].zero_()),
        BLIND,
        "model.safetensors",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_named(
    change: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = break_off(source, tmp_path / "packed", monkeypatch, *BLIND)
    spoil, options, part = CHANGES[change]
    spoil(source)
    before = snapshot(tmp_path)
    refused(["convert", str(source), str(tmp_path / "packed"), *options, "--resume"], capsys, str(work), part)
    # What was done is still there for whoever changes it back.
    assert snapshot(tmp_path) == before


def test_a_changed_calibration_text_is_named(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "text"
    mine.write_bytes(text.read_bytes())
    options = ["--calibration", str(mine), "--calibration-sequences", "1", *BLIND]
    break_off(source, tmp_path / "packed", monkeypatch, *options)
    mine.write_bytes(text.read_bytes() + b" and more")
    refused(["convert", str(source), str(tmp_path / "packed"), *options, "--resume"], capsys, "--calibration")


def test_resume_is_asked_for_and_has_something_to_resume(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["convert", str(source), str(tmp_path / "packed"), *BLIND]
    refused([*arguments, "--resume"], capsys, "no interrupted conversion", "leave out --resume")
    assert not (tmp_path / ".packed.partial").exists()
    work = break_off(source, tmp_path / "packed", monkeypatch, *BLIND)
    refused(arguments, capsys, "was interrupted", "--resume", str(work))
    assert main([*arguments, "--resume"]) == 0
    assert not work.exists()
    refused([*arguments, "--resume"], capsys, "exists already")


def test_a_shard_that_changed_meanwhile_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = break_off(source, tmp_path / "packed", monkeypatch, *BLIND)
    shard = work / "model-00001-of-00004.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    refused(["convert", str(source), str(tmp_path / "packed"), *BLIND, "--resume"], capsys, str(shard), "remove")


def test_a_torn_line_of_the_journal_does_not_count(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = break_off(source, tmp_path / "packed", monkeypatch, *BLIND)
    journal = work / "journal.jsonl"
    journal.write_text(journal.read_text()[:-40])
    assert main(["convert", str(source), str(tmp_path / "packed"), *BLIND, "--resume"]) == 0
    assert main(["convert", str(source), str(tmp_path / "whole"), *BLIND]) == 0
    assert main(["verify", str(source), str(tmp_path / "packed")]) == 0
    shards = [{k: v for k, v in snapshot(tmp_path / name).items() if "model-" in k} for name in ("packed", "whole")]
    assert shards[0] == shards[1]


@pytest.mark.heavy
def test_a_process_that_is_killed_leaves_what_can_be_resumed(source: Path, tmp_path: Path) -> None:
    """Nothing cleans up after SIGKILL; meanwhile no other run may write there."""
    program = (
        "import sys, time\n"
        "from vllm_puzzle.cli import main\n"
        "from vllm_puzzle.offline.checkpoints.shards import ShardWriter\n"
        "write, count = ShardWriter.write, [0]\n"
        "def slowly(writer, name, tensor):\n"
        "    write(writer, name, tensor); count[0] += 1\n"
        "    if count[0] == 50: print('now', flush=True); time.sleep(600)\n"
        "ShardWriter.write = slowly\n"
        f"main(['convert', {str(source)!r}, {str(tmp_path / 'packed')!r}, '--rule', 'paper'])"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        assert main(["convert", str(source), str(tmp_path / "packed"), *BLIND, "--resume"]) == 1
        process.send_signal(signal.SIGKILL)
    assert main(["convert", str(source), str(tmp_path / "packed"), *BLIND, "--resume"]) == 0
    assert main(["verify", str(source), str(tmp_path / "packed")]) == 0


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", [RECIPES[0], RECIPES[2]], ids=" ".join)
def test_processes_side_by_side_give_the_same_bytes(
    recipe: list[str], source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As vLLM's CPU worker does in a process that it has run in.
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    options = with_text(recipe, text)
    assert main(["convert", str(source), str(tmp_path / "one" / "packed"), *options]) == 0
    assert main(["convert", str(source), str(tmp_path / "two" / "packed"), *options, "--jobs", "2"]) == 0
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


@pytest.mark.heavy
def test_what_one_of_several_processes_finds_is_said_in_one_sentence(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.2.block_sparse_moe.experts.5.w3.weight"
    edit_tensors(source, lambda tensors: tensors[name][3].__setitem__(7, 1e30))
    before = snapshot(tmp_path)
    refused(["convert", str(source), str(tmp_path / "packed"), *BLIND, "--jobs", "2"], capsys, f"{name}[3, 7]", "65280")
    assert snapshot(tmp_path) == before


def test_the_manifest_tells_the_files_and_the_layers(source: Path, tmp_path: Path) -> None:
    assert main(["convert", str(source), str(tmp_path / "packed"), "--rule", "saliency"]) == 0
    manifest = json.loads((tmp_path / "packed" / "puzzlemoe_manifest.json").read_text())
    files = snapshot(tmp_path / "packed")
    shards = {shard["file"]: shard for shard in manifest["shards"]}
    assert shards.keys() == {name for name in files if name.endswith(".safetensors")}
    for name, shard in shards.items():
        assert shard["sha256"] == files[name]
        assert shard["num_bytes"] == (tmp_path / "packed" / name).stat().st_size
    assert [(layer["layer"], layer["pairs"]) for layer in manifest["layers"]] == [(0, 4), (1, 4), (2, 4)]
    assert all(0 < layer["relative_error"] < 1 for layer in manifest["layers"])
    # There are no tokens whose residual stream a loss could be compared with.
    assert {(layer["estimated_loss"], layer["coactivation"]) for layer in manifest["layers"]} == {(None, None)}
    assert "| 0 | 4 | not estimated | not estimated |" in (tmp_path / "packed" / "README.md").read_text()


@pytest.mark.parametrize(("size", "num_files"), [("1GB", 4), ("60KB", None), ("1", None)])
def test_no_file_is_larger_than_asked_for(size: str, num_files: int | None, source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    assert main(["convert", str(source), str(packed), *BLIND, "--shard-size", size]) == 0
    index = json.loads((packed / "model.safetensors.index.json").read_text())
    files = sorted(packed.glob("*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values())
    if num_files is not None:
        assert len(files) == num_files
    limit = {"1GB": 10**9, "60KB": 60_000, "1": 1}[size]
    for file in files:
        header = int.from_bytes(file.read_bytes()[:8], "little")
        held = [name for name, where in index["weight_map"].items() if where == file.name]
        assert file.stat().st_size - header - 8 <= limit or len(held) == 1
    assert main(["verify", str(source), str(packed)]) == 0


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--jobs", "0"], ("--jobs 0",)),
        (["--jobs", "2", "--rule", "compensated", "--calibration", "x"], ("--jobs 2", "leave out --jobs")),
        (["--shard-size", "0"], ("--shard-size 0",)),
    ],
)
def test_options_that_do_not_go(
    options: list[str], parts: tuple[str, ...], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["convert", str(source), str(tmp_path / "packed"), *options], capsys, *parts)


def test_a_size_without_sense_is_a_usage_error(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        main(["convert", str(source), str(tmp_path / "packed"), "--shard-size", "five"])
    assert error.value.code == 2
