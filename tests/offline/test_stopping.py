"""A conversion that a signal ends, or that is alive while another one begins."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.offline.faulty import assert_one_sentence, snapshot
from vllm_puzzle.cli import main

# Waits after the first layer, and says so; other processes wait in the last one.
SLOW_CONVERSION = """\
import signal, sys, time
from vllm_puzzle.cli import main
from vllm_puzzle.offline.conversion.journal import Journal
from vllm_puzzle.offline.checkpoints.shards import ShardWriter
record, write = Journal.record, ShardWriter.write
def record_slowly(journal, step, result):
    record(journal, step, result)
    if step == "unit 1":
        print("now", flush=True)
        time.sleep(600)
def write_slowly(writer, name, tensor):
    write(writer, name, tensor)
    if name.startswith("model.layers.2."):
        time.sleep(600)
if __name__ == "__main__":
    # Ignored where the tests run in the background of a shell.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Journal.record = record_slowly
    sys.exit(main(sys.argv[1:]))
ShardWriter.write = write_slowly
"""


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    path = tmp_path / "slow.py"
    path.write_text(SLOW_CONVERSION)
    return path


def start(slow: Path, *words: str) -> "subprocess.Popen[str]":
    """A conversion that has written its first layer and now waits; a process group of its own, as from a shell."""
    process = subprocess.Popen(
        [sys.executable, str(slow), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    return process


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("jobs", "number", "whole_group", "status"),
    [
        ("1", signal.SIGTERM, False, 143),
        ("2", signal.SIGINT, True, 130),
        ("2", signal.SIGTERM, False, 143),
        ("2", signal.SIGKILL, False, -9),
    ],
)
def test_a_conversion_that_is_stopped(
    jobs: str, number: signal.Signals, whole_group: bool, status: int, slow: Path, source: Path, tmp_path: Path
) -> None:
    words = ["convert", str(source), str(tmp_path / "packed"), "--rule", "paper"]
    process = start(slow, *words, "--jobs", jobs)
    children = psutil.Process(process.pid).children(recursive=True)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, error = process.communicate(timeout=300)
    assert process.returncode == status
    assert "Traceback" not in error
    # None outlives it, those included that write a layer.
    _, alive = psutil.wait_procs(children, timeout=300)
    assert alive == []
    if status > 0:
        assert error.splitlines()[-1].split(";")[0] == ("interrupted" if number == signal.SIGINT else "terminated")
        assert f"{tmp_path / '.packed.partial'} keeps what is done" in error
        assert "--resume" in error
    assert not (tmp_path / "packed").exists()
    assert main([*words, "--resume"]) == 0
    assert main(["verify", str(source), str(tmp_path / "packed")]) == 0


@pytest.mark.heavy
def test_another_conversion_that_is_alive(
    slow: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever else could be said, nobody is told to remove what it writes, and nothing of it is."""
    words = ["convert", str(source), str(tmp_path / "packed"), "--rule", "paper"]
    process = start(slow, *words)
    try:
        before = snapshot(tmp_path)
        for options in ([], ["--resume"], ["--calibration", "nowhere"]):
            assert_one_sentence(capsys, [*words, *options], "another conversion is writing", "wait for it")
        assert snapshot(tmp_path) == before
    finally:
        process.kill()
        process.communicate()
