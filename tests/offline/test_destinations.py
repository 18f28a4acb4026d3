"""Where a checkpoint is written: refused beforehand or at the end, and what is left then."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.offline.faulty import assert_refused, snapshot
from vllm_puzzle.cli import main
from vllm_puzzle.offline.checkpoints.shards import ShardLayout
from vllm_puzzle.offline.checkpoints.writer import CheckpointWriter


def test_destinations(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("precious")
    assert_refused(["convert", str(source), str(tmp_path / "there")], tmp_path, capsys, "exists already")
    assert_refused(["convert", str(source), str(tmp_path / "no" / "packed")], tmp_path, capsys, "no does not exist")
    assert_refused(["convert", str(tmp_path / "none"), str(tmp_path / "p")], tmp_path, capsys, "is not a directory")


@pytest.mark.parametrize("through_link", [False, True])
@pytest.mark.parametrize("command", ["convert", "unpack"])
def test_no_folder_in_what_is_read(
    command: str, through_link: bool, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "sub").mkdir()
    (tmp_path / "link").symlink_to(source)
    around = tmp_path / "link" if through_link else source
    for destination in (around / "packed", around / "sub" / "packed"):
        assert_refused([command, str(source), str(destination)], tmp_path, capsys, f"{destination} lies in {source}")
    beside = f"{source}-packed"
    assert main(["convert", str(source), beside, "--rule", "paper"]) == 0


@pytest.mark.skipif(not os.access("/proc", os.W_OK), reason="needs a user who may write everywhere")
def test_a_file_system_without_files(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(
        ["convert", str(source), "/proc/packed"], tmp_path, capsys, "/proc is on a file system that holds no"
    )


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

    def make_destination(writer: CheckpointWriter, shards: Sequence[ShardLayout]) -> None:
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


def test_nothing_is_replaced_that_was_made_while_unpacking(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    assert main(["convert", str(source), str(packed), "--rule", "paper"]) == 0
    add_index = CheckpointWriter.add_index

    def make_destination(writer: CheckpointWriter, shards: Sequence[ShardLayout]) -> None:
        add_index(writer, shards)
        plain.mkdir()

    monkeypatch.setattr(CheckpointWriter, "add_index", make_destination)
    capsys.readouterr()
    assert main(["unpack", str(packed), str(plain)]) == 1
    assert "was made meanwhile" in capsys.readouterr().err
    assert list(plain.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "plain", "source"]


def test_a_disk_without_room(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000, total=10**12))
    assert_refused(
        ["convert", str(source), str(tmp_path / "packed")],
        tmp_path,
        capsys,
        "needs 806 kB and its disk has 1.00 kB free",
    )


@pytest.mark.heavy
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
