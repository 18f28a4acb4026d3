"""`python -m benchmarks.gpu_session` as it is typed, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_session.__main__ import main
from tests.benchmarks.gpu_session.stages import lines


def test_a_session_in_the_interpreter(tmp_path: Path) -> None:
    """The program, as it is typed, with the stages that take least."""
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--out", str(tmp_path), "--fake", "--seconds", "300"]
    run = subprocess.run([*command, "--stages", "graphs"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = lines(tmp_path)
    assert [row["stage"] for row in rows if row["what"] == "stage"] == ["card", "graphs"]
    assert "- graph: 3 of 3 right" in run.stdout
    assert (tmp_path / "summary.md").read_text().strip() in run.stdout


def test_a_wrong_result_makes_the_program_fail(tmp_path: Path) -> None:
    # Python imports it first, in every process: what should be right is twice as much.
    (tmp_path / "sitecustomize.py").write_text(
        "from vllm_puzzle.kernels import reference\n"
        "right = reference.reference_moe\n"
        "reference.reference_moe = lambda *arguments: 2 * right(*arguments)\n"
    )
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--out", str(tmp_path), "--fake", "--seconds", "300"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run([*command, "--stages", "graphs"], capture_output=True, text=True, env=environment)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "- graph: 0 of 3 right" in run.stdout
    assert run.stdout.count("**WRONG**") == 3


def test_ended_from_outside_it_still_says_what_it_found(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--out", str(tmp_path), "--fake", "--seconds", "300"]
    process = subprocess.Popen([*command, "--stages", "correct"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while '"what": "gpu"' not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "- interpreter, 4 multiprocessors" in output
    assert "when no longer needed" in output


@pytest.mark.slow
def test_a_whole_session_in_the_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--out", str(tmp_path), "--fake", "--seconds", "500"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = lines(tmp_path)
    stages = [row["stage"] for row in rows if row["what"] == "stage"]
    assert {"card", "ceilings", "compile", "correct", "graphs", "times tiny", "tune"} <= set(stages)
    assert all(row["ok"] for row in rows if "ok" in row)
    assert len(list((tmp_path / "tiles").iterdir())) == 1


@pytest.mark.parametrize(("arguments", "status", "sentence"), [
    (["--out", "file"], 1, "file cannot be written: "),
    (["--out", "out", "--peer", "."], 2, "--peer . has no folder vllm"),
    (["--out", "out", "--stages", "none"], 2, "invalid choice: 'none'"),
])  # fmt: skip
def test_what_cannot_be_done_is_one_sentence(
    arguments: list[str],
    status: int,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(sys, "argv", ["gpu_session", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == status
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not Path("out").exists()


def test_a_machine_without_a_card_is_told_so(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--out", str(tmp_path), "--seconds", "100"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 1
    assert "- **BROKEN** card: the triton engine needs a CUDA or ROCm device" in run.stdout
