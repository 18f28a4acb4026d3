"""The Triton engine under other versions of Triton: whether it compiles, and within its budgets.

    python -m benchmarks.triton_versions 3.6.0 3.7.1 3.8.0 --targets sm90

pip puts the wheel of each version into a folder of its own, which takes up to 900 MB until it is removed again, and
`benchmarks.gpu_static` runs with that folder in front of what is installed. torch stays as it is: whatever compiles
ahead of time asks nothing of it. Exit status 1 if a version is not to be had, does not compile or misses a budget.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

VERSIONS = ("3.6.0", "3.7.1", "3.8.0")
HEADER = """\
| Triton | main loops | over budget | other kernels | spilling | most registers | most bytes spilled |
|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Report:
    """What became of one version; main loops are those of the products, other kernels are what surrounds them.

    Attributes:
        error: why there are no numbers, or nothing.
        missed: main loops that miss a budget; spilling: other kernels that spill.
        registers: the most of a thread in any of the products; spill_bytes: the most of any kernel.
    """

    version: str
    error: str = ""
    loops: int = 0
    missed: int = 0
    other_kernels: int = 0
    spilling: int = 0
    registers: int = 0
    spill_bytes: int = 0

    @property
    def passed(self) -> bool:
        return not (self.error or self.missed or self.spilling)


def install(version: str, folder: Path) -> str:
    """Puts Triton's wheel, and nothing it depends on, into a folder. Returns why it could not, or nothing."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    run = subprocess.run([*command, f"triton=={version}"], capture_output=True, text=True)
    return f"pip cannot install it: {_last_line(run.stderr)}" if run.returncode else ""


def compile_with(version: str, folder: Path, targets: list[str]) -> Report:
    """Runs `benchmarks.gpu_static` with the Triton of a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as results:
        rows = Path(results) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.gpu_static", "--targets", *targets, "--json", str(rows)]
        run = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if not rows.exists():
            return Report(version, f"not everything compiles: {_last_line(run.stderr)}")
        return summarize(version, json.loads(rows.read_bytes()))


def summarize(version: str, document: dict[str, Any]) -> Report:
    """The report of what `benchmarks.gpu_static --json` wrote."""
    rows, others = document["rows"], document["other_kernels"]
    return Report(
        version,
        loops=len(rows),
        missed=sum(bool(row["misses"]) for row in rows),
        other_kernels=len(others),
        spilling=sum(other["spill_bytes"] > 0 for other in others),
        registers=max(row["registers"] for row in rows),
        spill_bytes=max(row["spill_bytes"] for row in [*rows, *others]),
    )


def table_line(report: Report) -> str:
    """The report as a line of the table in Markdown that begins with HEADER."""
    counts = [report.loops, report.missed, report.other_kernels, report.spilling]
    cells = [report.error] if report.error else map(str, [*counts, report.registers, report.spill_bytes])
    return f"| {' | '.join([report.version, *cells])} |"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it says nothing"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.triton_versions", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION", help=f"by default {VERSIONS}")
    parser.add_argument("--targets", nargs="+", default=["sm90"], metavar="TARGET", help="as of gpu_static")
    arguments = parser.parse_args()
    print(HEADER, flush=True)
    passed = True
    for version in tqdm(arguments.versions, unit="version"):
        with tempfile.TemporaryDirectory() as folder:
            error = install(version, Path(folder))
            report = Report(version, error) if error else compile_with(version, Path(folder), arguments.targets)
        tqdm.write(table_line(report))
        passed &= report.passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
