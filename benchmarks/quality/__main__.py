"""Measure what packing and its peers cost a real model, in one table.

    python -m benchmarks.quality --json FILE [--plot FILE]

Both variants of the reference model, calibrated on C4, scored on Wikipedia text that nothing was calibrated on, in
windows that share no context. Each variant has a process and half of the cores: most of the work is too small for more.
Takes about an hour on two cores.
"""

import argparse
import json
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import get_args

import torch
import transformers

from benchmarks.quality.measure import (
    CALIBRATION_SEQUENCES,
    CONTINUATION_LENGTH,
    PROMPT_LENGTH,
    PROMPTS,
    SEED,
    SEQUENCE_LENGTH,
    TEXT_TOKENS,
    measure,
)
from benchmarks.quality.plot import plot
from benchmarks.reference_model.build import Variant, build
from benchmarks.reference_model.wheels import DEFAULT_CACHE, ReferenceModelError, read_text
from vllm_puzzle.offline.errors import CheckpointError


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="where the rows go")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of them, .svg or .png")
    parser.add_argument("--work", type=Path, default=Path(".cache/quality"), help="keeps the models (%(default)s)")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="keeps the wheels (%(default)s)")
    args = parser.parse_args(argv)
    text = f"wiki, {TEXT_TOKENS} tokens in windows of {SEQUENCE_LENGTH}"
    num_threads = max(1, torch.get_num_threads() // len(get_args(Variant)))
    setup = {
        "text": text,
        "calibration": f"c4, {CALIBRATION_SEQUENCES} sequences of 2048 tokens",
        "generation": f"{PROMPTS} prompts of {PROMPT_LENGTH} tokens, {CONTINUATION_LENGTH} tokens greedily",
        "seed": SEED,
        "device": f"{platform.processor() or platform.machine()}, {num_threads} threads a variant",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    start = time.perf_counter()
    try:
        args.work.mkdir(parents=True, exist_ok=True)
        calibration = args.work / "c4.txt"
        calibration.write_text(read_text("c4", args.cache), encoding="utf-8")
        variants = get_args(Variant)
        for name in variants:
            if not (args.work / name).exists():
                build(name, args.work / name, args.cache)
        with ProcessPoolExecutor(len(variants), get_context("spawn")) as pool:
            jobs = [
                pool.submit(measure, name, args.work / name, calibration, args.cache, num_threads) for name in variants
            ]
            results = [job.result() for job in jobs]
        kinds = ("rows", "generation", "seeds")
        content = {kind: [row for tables in results for row in getattr(tables, kind)] for kind in kinds}
        args.json.write_text(json.dumps({"setup": setup, **content}, indent=1) + "\n", encoding="utf-8")
        if args.plot is not None:
            plot(content["rows"], args.plot, f"{text}; 135M parameters")
    except (ReferenceModelError, CheckpointError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    print(f"{len(content['rows'])} rows in {(time.perf_counter() - start) / 60:.0f} minutes", file=sys.stderr)


if __name__ == "__main__":
    main()
