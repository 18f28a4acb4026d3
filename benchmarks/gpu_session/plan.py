"""Which stages run, in which order, and how long each may take."""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_session.session import Row, Session, Stage
from benchmarks.gpu_session.workload import FAKE, REAL, Workload

STAGES = ("ceilings", "compile", "correct", "graphs", "times", "tune", "sanitizer", "ncu")
# Seconds until a stage is killed.
LIMITS = {"card": 40, "ceilings": 40, "correct": 75, "graphs": 40, "times": 80, "sanitizer": 75, "ncu": 60}
TUNE_SECONDS = 90
FAKE_TUNE_SECONDS = 5
# The interpreter takes as long as the machine is busy.
FAKE_PATIENCE = 6
# Past what the search may take: importing, random experts, a measurement that is under way.
TUNE_SPARE = 30
# How long a stage's kernels are waited for; what is not compiled by then, the stage compiles.
COMPILE_SECONDS = 60
SECTIONS = (
    *("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats"),
    *("WarpStateStats", "SchedulerStats", "InstructionStats"),
)
# vLLM has tuned tiles of H200 for shapes of which H100, the same processor, has none.
PEER_TILES = {90: "NVIDIA_H200"}


@dataclass(frozen=True)
class Options:
    """What the command line asks for; `peer` is a folder, `jobs` the processes that compile."""

    out: Path
    peer: Path | None
    fake: bool
    jobs: int | None
    stages: tuple[str, ...]

    @property
    def workload(self) -> Workload:
        return FAKE if self.fake else REAL


def _environment(options: Options, gpu: Mapping[str, Any] | None = None) -> dict[str, str]:
    paths = [str(options.peer)] * bool(options.peer) + [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if options.fake:
        environment["TRITON_INTERPRET"] = "1"
    if gpu is not None:
        environment["PEER_DEVICE_NAME"] = PEER_TILES.get(gpu["arch"], gpu["device_name"].replace(" ", "_"))
    return environment


def _command(options: Options, stage: str, *more: str) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--out", str(options.out), "--stage", stage, *more]
    command += ["--fake"] * options.fake
    command += ["--peer", str(options.peer)] * bool(options.peer)
    return command + (["--jobs", str(options.jobs)] if options.jobs else [])


def _compile(options: Options, gpu: Mapping[str, Any], limit: float) -> Stage:
    command = [*_command(options, "compile", "--gpu", json.dumps(gpu)), "--stages", *options.stages]
    return Stage("compile", command, limit, _environment(options, gpu))


def _is_compiled(name: str, rows: Sequence[Row]) -> bool:
    """Whether all that a stage launches is."""
    counts = [row["count"] for row in rows if row["what"] == "to compile" and row["stage"] == name]
    done = sum(row["what"] == "compiled" and row["stage"] == name for row in rows)
    begun = any(row["what"] == "to compile" for row in rows)
    return begun and done >= sum(counts)


def compile_only(session: Session, options: Options) -> None:
    """Compiles for an H100 that is not here everything that the stages would launch there."""
    from dataclasses import asdict

    from vllm_puzzle.tuning.gpu import HOPPER

    session.run(_compile(options, asdict(HOPPER), session.left))


def whole(session: Session, options: Options) -> None:
    """The session; what the card is comes first, since everything is compiled for it."""
    environment = _environment(options)

    def run(name: str, *more: str, limit: float = 0, prefix: Sequence[str] = (), **changed: str) -> None:
        kind = name.split()[0]
        command = [*prefix, *_command(options, kind, *more)]
        most = (limit or LIMITS[kind]) * (FAKE_PATIENCE if options.fake else 1)
        session.run(Stage(name, command, most, environment | changed))

    run("card")
    card = next((row for row in session.rows if row["what"] == "gpu"), None)
    if card is None:
        return
    gpu = card["gpu"]
    environment = _environment(options, gpu)
    compiling = None
    if "compile" in options.stages:
        compiling = session.start(_compile(options, gpu, session.left))

    def wait(name: str) -> None:
        if compiling is not None:
            session.wait(lambda rows: compiling.over or _is_compiled(name, rows), COMPILE_SECONDS)

    if "ceilings" in options.stages:
        run("ceilings")
    for name in ("correct", "graphs"):
        if name in options.stages:
            wait(name)
            run(name)
    if "times" in options.stages:
        for shape in options.workload.shapes:
            wait(f"times {shape.name}")
            run(f"times {shape.name}", "--gpu", json.dumps(shape.name))
    if compiling is not None:
        # The search compiles for itself from here on.
        wait("tune")
        session.end(compiling)
    if "tune" in options.stages:
        seconds = min(FAKE_TUNE_SECONDS if options.fake else TUNE_SECONDS, session.left - TUNE_SPARE)
        run("tune", "--limit", str(max(1.0, seconds)), limit=TUNE_SECONDS + TUNE_SPARE)
    if "sanitizer" in options.stages and shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            watched = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "5"]
            run(f"sanitizer {tool}", prefix=watched, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if "ncu" in options.stages and shutil.which("ncu"):
        which = ["--kernel-name", "regex:gate_up_kernel|down_kernel", "--launch-skip", "2", "--launch-count", "2"]
        log = ["--csv", "--page", "details", "--log-file", str(options.out / "ncu.csv")]
        sections = [f"--section={name}" for name in SECTIONS]
        run("ncu", prefix=["ncu", "--clock-control", "none", *which, *sections, *log])
