"""Measure what packing and its peers cost a real model, in one table.

    python -m benchmarks.quality --json FILE [--plot FILE] [--models NAME...] [--rows REGEX]

The reference model in its variants and their twins, calibrated on C4, scored on text that nothing was calibrated on, in
windows that share no context. As many variants as there are threads have a process each: most of the work is too small
for more. All of it takes hours; `--models`, `--rows` and the sizes choose a part.
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

from benchmarks.quality.measure import CONTINUATION_LENGTH, PROMPT_LENGTH, SEQUENCE_LENGTH, Settings, measure
from benchmarks.quality.plot import FIGURES, plot
from benchmarks.reference_model.build import Variant, build
from benchmarks.reference_model.wheels import DEFAULT_CACHE, ReferenceModelError, TextName, read_text
from vllm_puzzle.offline.errors import CheckpointError

# Characters of the calibration text between the beginnings of two seeds: more than 8 sequences take.
_SEED_STEP = 100_000


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="where the rows go")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of them, .svg or .png")
    parser.add_argument("--figure", choices=FIGURES, default="perplexity", help="of the picture (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path(".cache/quality"), help="keeps the models (%(default)s)")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="keeps the wheels (%(default)s)")
    parser.add_argument("--models", nargs="+", choices=get_args(Variant), default=get_args(Variant))
    parser.add_argument("--rows", default="", metavar="REGEX", help="only methods in whose names it is found")
    default = Settings()
    parser.add_argument("--text", choices=get_args(TextName), default=default.text, help="what is scored (%(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=default.text_tokens, help=f"scored, a multiple of {SEQUENCE_LENGTH} (%(default)s)"
    )
    parser.add_argument("--sequences", type=int, default=default.sequences, help="to calibrate on (%(default)s)")
    parser.add_argument("--prompts", type=int, default=default.prompts, help="continued greedily (%(default)s)")
    parser.add_argument("--pairings", type=int, default=default.pairings, help="drawn (%(default)s)")
    parser.add_argument("--seed", type=int, choices=range(3), default=0, help="of pairs and calibration (%(default)s)")
    args = parser.parse_args(argv)
    settings = Settings(args.text, args.tokens, args.sequences, args.prompts, args.pairings, args.rows, args.seed)
    text = f"{settings.text}, {settings.text_tokens} tokens in windows of {SEQUENCE_LENGTH}"
    num_processes = min(len(args.models), torch.get_num_threads())
    num_threads = torch.get_num_threads() // num_processes
    setup = {
        "text": text,
        "calibration": f"c4, {settings.sequences} sequences of 2048 tokens",
        "generation": f"{settings.prompts} prompts of {PROMPT_LENGTH} tokens, {CONTINUATION_LENGTH} tokens greedily",
        "seed": settings.seed,
        "device": f"{platform.processor() or platform.machine()}, {num_threads} threads a model",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    start = time.perf_counter()
    try:
        args.work.mkdir(parents=True, exist_ok=True)
        calibration = args.work / f"c4-{settings.seed}.txt"
        calibration.write_text(read_text("c4", args.cache)[_SEED_STEP * settings.seed :], encoding="utf-8")
        for name in args.models:
            if not (args.work / name).exists():
                build(name, args.work / name, args.cache)
        with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
            jobs = [
                pool.submit(measure, name, args.work / name, calibration, args.cache, settings, num_threads)
                for name in args.models
            ]
            results = [job.result() for job in jobs]
        kinds = ("rows", "generation", "seeds")
        content = {kind: [row for tables in results for row in getattr(tables, kind)] for kind in kinds}
        args.json.write_text(json.dumps({"setup": setup, **content}, indent=1) + "\n", encoding="utf-8")
        if args.plot is not None:
            plot(content["rows"], args.plot, f"{text}; 135M parameters", args.figure)
    except (ReferenceModelError, CheckpointError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    print(f"{len(content['rows'])} rows in {(time.perf_counter() - start) / 60:.0f} minutes", file=sys.stderr)


if __name__ == "__main__":
    main()
