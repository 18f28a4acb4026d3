"""Measure the converter on a synthetic Mixtral: rate, memory, what becomes of full disks, kills and damaged sources.

    python -m benchmarks.convert --json FILE

The source's layers have the experts of Mixtral-8x7B. Rates are of whole commands, start-up included, from files that
are not in the page cache to files on the disk, and so is that of a plain copy of the source. Takes room for three
times the source and, after that, for twice the layers.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.convert.disks import small_disk
from benchmarks.convert.fuzz import fuzz
from benchmarks.convert.kills import kill_and_resume
from benchmarks.convert.measure import Run, convert, convert_unbroken, copy
from benchmarks.convert.source import MixtralSizes, write_source

LAYERS = 5
SMALL = MixtralSizes(num_hidden_layers=12, hidden_size=1024, intermediate_size=2048)
KILLS = 20
FUZZED_FILES = 2000
ROUNDS = 3


def measure_rates(work: Path, sizes: MixtralSizes, rounds: int) -> dict[str, object]:
    """Copies and conversions by two processes and by one, interleaved; medians over the rounds."""
    source_bytes = write_source(work / "source", sizes)
    copies: list[float] = []
    runs: dict[int, list[Run]] = {2: [], 1: []}
    for _ in range(rounds):
        copies.append(copy(work / "source", work / "copy"))
        shutil.rmtree(work / "copy")
        for jobs, made in runs.items():
            made.append(convert(work / "source", work / "packed", jobs))

    def describe(jobs: int) -> dict[str, object]:
        made = runs[jobs]
        seconds = statistics.median(run.seconds for run in made)
        return {
            "jobs": jobs,
            "gb_per_s": source_bytes / seconds / 1e9,
            "share_of_copy": statistics.median(copies) / seconds,
            "peak_rss_bytes": max(run.peak_rss_bytes for run in made),
            "seconds": [run.seconds for run in made],
        }

    return {
        "source_bytes": source_bytes,
        "layers": sizes.num_hidden_layers,
        "layer_expert_bytes": sizes.layer_expert_bytes,
        "copy_gb_per_s": source_bytes / statistics.median(copies) / 1e9,
        "copy_seconds": copies,
        **describe(2),
        "one_process": describe(1),
    }


def measure_growth(work: Path, sizes: MixtralSizes) -> dict[str, object]:
    """The most memory for a source with twice the layers."""
    write_source(work / "source", sizes)
    run = convert(work / "source", work / "packed", 1)
    return {"layers": sizes.num_hidden_layers, "peak_rss_bytes": run.peak_rss_bytes, "seconds": run.seconds}


def _tell(result: dict[str, object]) -> dict[str, object]:
    # Each part takes minutes: a run that is stopped has printed the parts before.
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="where the figures go")
    parser.add_argument("--work", type=Path, default=Path(".cache/convert"), help="for the files (%(default)s)")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        result = measure_rates(args.work, MixtralSizes(LAYERS, 4096, 14336), ROUNDS)
        _tell(result)
        result["twice_the_layers"] = _tell(measure_growth(args.work, MixtralSizes(2 * LAYERS, 4096, 14336)))
        source = args.work / "source"
        write_source(source, SMALL)
        whole = convert_unbroken(source, args.work / "whole")
        result["small_disk"] = _tell(small_disk(source, whole, args.work))
        result["kill_test"] = _tell(kill_and_resume(source, whole, args.work, KILLS, seed=0))
        result["fuzz"] = _tell(fuzz(args.work / "fuzz", FUZZED_FILES, seed=0))
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{parser.prog}: {error}")
    finally:
        shutil.rmtree(args.work, ignore_errors=True)
    result["machine"] = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
