"""The session on a card where there is none: stages that fail in every way, and all of it in Triton's interpreter."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_session.__main__ import main
from benchmarks.gpu_session.correctness import check_all
from benchmarks.gpu_session.fake_card import FakeCard
from benchmarks.gpu_session.peer import PeerError, gather
from benchmarks.gpu_session.peer import main as gather_peer
from benchmarks.gpu_session.session import Session, Stage
from benchmarks.gpu_session.summary import failures, summary
from benchmarks.gpu_session.workload import FAKE, REAL, compile_peer, tasks
from vllm_puzzle.kernels.triton.moe import triton_moe
from vllm_puzzle.kernels.triton.target import INTERPRETED
from vllm_puzzle.tuning.compiling import CompilePool
from vllm_puzzle.tuning.gpu import HOPPER
from vllm_puzzle.tuning.shape import MoEShape

Row = dict[str, Any]


def lines(out: Path) -> list[Row]:
    return [json.loads(line) for line in (out / "session.jsonl").read_text().splitlines()]


def stage(name: str, script: str, limit: float = 60) -> Stage:
    return Stage(name, [sys.executable, "-c", script], limit)


def say(**fields: Any) -> str:
    return f"print({json.dumps(fields)!r}, flush=True);"


def test_a_stage_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    # Its child keeps the pipe open, and ignores what can be ignored.
    hanging = (
        say(what="begun")
        + "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        + "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        + f"open({str(pid_file)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    with Session(tmp_path, 60) as session:
        assert not session.run(stage("hang", hanging, 6))
        assert session.run(stage("next", say(what="here")))
    rows = lines(tmp_path)
    assert [row["what"] for row in rows] == ["begun", "stage", "here", "stage"]
    assert (rows[1]["status"], rows[1]["ended"]) == (-9, "at its limit")
    child = Path(f"/proc/{pid_file.read_text()}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"
    assert len(failures(rows)) == 1
    assert "| hang | 6 s | status -9, at its limit |" in summary(rows)


def test_a_stage_that_crashes_keeps_its_lines_and_its_last_words(tmp_path: Path) -> None:
    with Session(tmp_path, 60) as session:
        crash = say(what="begun") + "import os, sys; print('illegal', 'access', file=sys.stderr); os.abort()"
        assert not session.run(stage("crash", crash))
        assert session.run(stage("next", say(what="here")))
    rows = lines(tmp_path)
    assert [row["what"] for row in rows] == ["begun", "stage", "here", "stage"]
    assert rows[1]["status"] == -6
    assert "illegal access" in rows[1]["output"]
    assert rows[0]["stage"] == "crash"


def test_nobody_waits_for_a_stage_that_is_over(tmp_path: Path) -> None:
    with Session(tmp_path, 300) as session:
        crash = session.start(stage("beside", say(what="begun") + "import os; os.abort()"))
        assert crash is not None
        begin = time.monotonic()
        assert session.wait(lambda rows: crash.over or any(row["what"] == "never" for row in rows), 200)
        assert time.monotonic() - begin < 100
    assert [row["what"] for row in lines(tmp_path)] == ["begun", "stage"]


def test_the_time_is_kept_whatever_runs(tmp_path: Path) -> None:
    begin = time.monotonic()
    with Session(tmp_path, 12) as session:
        beside = session.start(stage("beside", "import time; time.sleep(600)"))
        assert beside is not None
        session.run(stage("long", "import time; time.sleep(600)"))
        assert not session.run(stage("late", say(what="here")))
    assert time.monotonic() - begin < 15
    rows = {row["stage"]: row for row in lines(tmp_path)}
    assert rows["long"]["ended"] == "at its limit"
    assert "seconds are left" in rows["late"]["skipped"]
    assert rows["beside"]["ended"] == "when no longer needed"


def test_a_line_is_on_the_disk_when_it_is_printed(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from benchmarks.gpu_session.session import Session, Stage\n"
        "with Session(Path(sys.argv[1]), 60) as session:\n"
        "    session.run(Stage('one', [sys.executable, '-c', sys.argv[2]], 50))\n"
    )
    slow = say(what="first") + "import time; time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), slow], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = json.loads(process.stdout.readline())
    assert lines(tmp_path) == [printed]
    # Ended from outside, it ends its stage.
    process.terminate()
    process.wait(30)
    assert lines(tmp_path)[-1]["stage"] == "one"
    process.stdout.close()


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")
def test_a_wrong_result_is_reported(tmp_path: Path) -> None:
    """From the check that finds it to the summary: a kernel that forgets a token, and one that does not repeat."""
    rows: list[Row] = []
    turns = []

    def wrong(*arguments: Any) -> torch.Tensor:
        output = triton_moe(*arguments)
        turns.append(None)
        if len(output) and len(turns) % 2:
            output[-1] = 0
        return output

    workload = MoEShape("even", num_experts=6, hidden_size=32, intermediate_size=16, top_k=2)
    small = type(FAKE)(**{**FAKE.__dict__, "checked": (workload,), "checked_tokens": (0, 1), "keys": 1})
    check_all(FakeCard(), small, lambda **row: rows.append(row), wrong)
    assert {row["ok"] for row in rows if row["tokens"] == 0} == {True}
    assert {row["ok"] for row in rows if row["tokens"] == 1} == {False}
    assert not any(row["repeats"] for row in rows if row["tokens"] == 1)
    with Session(tmp_path, 60) as session:
        session.run(stage("correct", "".join(say(**row) for row in rows)))
    assert len(failures(session.rows)) == sum(not row["ok"] for row in rows)
    text = summary(session.rows)
    assert f"- correct: {len(rows) // 2} of {len(rows)} right" in text
    assert "**WRONG**" in text
    assert "tokens 1" in text


def test_what_is_right_is_no_failure() -> None:
    rows = [
        {"what": "ceilings", "read_gb_per_s": 3000.0, "bf16_tflops": 600.0},
        {"what": "time", "shape": "Qwen", "tokens": 16, "routing": "random", "engine": "vllm_bf16", "ok": True}
        | {"us": 300.0, "gb_per_s": 2400.0, "tflops": 6.0, "ratio_vs_vllm_bf16": 1.0},
        {"what": "time", "shape": "Qwen", "tokens": 16, "routing": "random", "engine": "packed", "ok": True}
        | {"us": 200.0, "gb_per_s": 2100.0, "tflops": 9.0, "ratio_vs_vllm_bf16": 1.5},
        {"what": "time", "shape": "Qwen", "tokens": 16, "routing": "random", "engine": "vllm_fp8", "error": "none"},
        {"what": "tuned", "tokens": 16, "us": 150.0, "us_before": 200.0, "measured": 9, "failed": 1, "ok": True}
        | {"finished": False},
        {"what": "stage", "stage": "times", "status": 0, "seconds": 12.0, "ended": "by itself"},
        {"what": "stage", "stage": "compile", "status": -9, "seconds": 99.0, "ended": "when no longer needed"},
    ]
    assert failures(rows) == []
    text = summary(rows)
    assert "| 16 | random | 300.0 µs, 2,400 GB/s (80%), 6 TF (1%), 1.00x | 200.0 µs, 2,100 GB/s (70%), 9 TF (2%), 1.50x |" in text  # fmt: skip # noqa: E501
    assert "| error |" in text
    assert "| 16 | 200.0 | 150.0 | 9 measured, 1 did not run, out of time |" in text
    assert "WRONG" not in text


def test_torch_triton_and_pydantic_are_enough() -> None:
    script = """
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"vllm", "tqdm", "transformers", "safetensors", "scipy", "yaml", "numpy"}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import benchmarks.gpu_session, vllm_puzzle.tuning
for package in (benchmarks.gpu_session, vllm_puzzle.tuning):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
from benchmarks.gpu_session.workload import REAL, tasks
from vllm_puzzle.tuning.gpu import HOPPER
print(len(list(tasks(REAL, HOPPER, peer=True))))
"""
    # As on a card: only Triton's interpreter is in need of numpy.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 100


def test_the_parent_imports_neither_torch_nor_triton() -> None:
    script = "import sys, benchmarks.gpu_session.__main__; print({'torch', 'triton'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "set()\n", run.stderr


def test_everything_that_is_launched_is_compiled_first() -> None:
    found = list(tasks(REAL, HOPPER, peer=True))
    names = [task.stage for task in found]
    assert list(dict.fromkeys(names)) == [
        *("correct", "graphs", "sanitizer", "ncu"),
        *(f"times {shape.name}" for shape in REAL.shapes),
        "tune",
    ]
    # Every default, with its sums in one part and two, in both dtypes.
    checked = [task.arguments for task in found if task.stage == "correct" and task.arguments[1] == REAL.checked[0]]
    cuts = list(REAL.cuts("sm90", REAL.checked[0]))
    assert {(arguments[3], arguments[5]) for arguments in checked} == {
        ("bfloat16", "int32"),
        ("bfloat16", "int64"),
        ("float16", "int32"),
    }
    assert len(checked) == 3 * len(cuts)


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


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """vLLM's fused_moe, gathered from the vLLM that is installed here."""
    vllm = next(folder for path in sys.path if (folder := Path(path) / "vllm").is_dir())
    zipped, folder = tmp_path / "peer.zip", tmp_path / "peer"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_session.peer", str(vllm), str(zipped)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(folder)
    return folder


def test_the_gathered_peer_imports_and_compiles(peer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PEER_DEVICE_NAME", "NVIDIA_H200")
    shape = MoEShape("", num_experts=8, hidden_size=256, intermediate_size=128, top_k=2)
    with CompilePool(HOPPER, workers=1, paths=[str(peer)]) as pool:
        done = list(pool.run(compile_peer, [(shape, 4, False), (shape, 4, True)]))
    assert [result.failure for result in done] == [None, None]
    names = {path.stem for path in (tmp_path / "cache").rglob("*.cubin")}
    assert {"fused_moe_kernel", "_silu_and_mul", "_quantize"} <= names


def test_the_compiled_library_comes_from_a_wheel(tmp_path: Path) -> None:
    fused = tmp_path / "vllm" / "model_executor" / "layers" / "fused_moe"
    fused.mkdir(parents=True)
    for name in ("fused_moe.py", "moe_align_block_size.py", "layer.py"):
        (fused / name).touch()
    wheel = tmp_path / "vllm.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/_moe_C_stable_libtorch.abi3.so", b"compiled")
        archive.writestr("vllm/_C.abi3.so", b"more")
    files = gather(tmp_path / "vllm", wheel)
    assert files["vllm/_moe_C_stable_libtorch.abi3.so"] == b"compiled"
    assert "vllm/logger.py" in files
    assert not {"vllm/_C.abi3.so", "vllm/model_executor/layers/fused_moe/layer.py"} & set(files)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/_C.abi3.so", b"more")
    with pytest.raises(PeerError, match=r"has no vllm/_moe_C_stable_libtorch.abi3.so; give a CUDA wheel"):
        gather(tmp_path / "vllm", wheel)


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda path: path.mkdir(), "has no vllm/model_executor/layers/fused_moe/fused_moe.py"),
    (lambda path: path.write_text("no zip"), "cannot be read as a wheel or a folder"),
    (lambda path: None, "cannot be read as a wheel or a folder"),
])  # fmt: skip
def test_what_is_no_vllm_is_refused(
    make: Any, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    make(source)
    monkeypatch.setattr(sys, "argv", ["peer", str(source), str(tmp_path / "peer.zip")])
    assert gather_peer() == 1
    output, error = capsys.readouterr()
    assert (output, error.count("\n"), sentence in error) == ("", 1, True)
    assert not (tmp_path / "peer.zip").exists()
