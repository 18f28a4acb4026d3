"""The Triton engine without a GPU: its machine code, compared with budgets, and a model of its time.

    python -m benchmarks.gpu_static --json FILE

Every default configuration is compiled ahead of time for the GPUs it is meant for, also with its sums split in two and
for float16, and the main loops are read in the machine code: `machine_code` says how instructions are counted, `rows`
which budgets there are. With `--targets` only those are compiled, and nothing is modelled. Exit status 1 if a budget is
missed.
"""

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tqdm import tqdm

from benchmarks.gpu_static.chips import CHIPS
from benchmarks.gpu_static.compiling import compile_surroundings
from benchmarks.gpu_static.costs import plan
from benchmarks.gpu_static.roofline import markdown, predictions
from benchmarks.gpu_static.rows import cases, measure
from benchmarks.gpu_static.table import table
from vllm_puzzle.kernels.triton.target import INTERPRETED


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_static", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=CHIPS, metavar="TARGET", help=f"some of {', '.join(CHIPS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and predictions here")
    arguments = parser.parse_args()
    if INTERPRETED:
        print("TRITON_INTERPRET is set, so that nothing would be compiled; unset it", file=sys.stderr)
        return 1
    targets = arguments.targets or list(CHIPS)
    chosen = [case for case in cases() if case.family in targets]
    rows = [row for case in tqdm(chosen, desc="compiling", unit="config") for row in measure(case)]
    print(table(rows))
    model = [] if arguments.targets else predictions(partial(plan, rows))
    if model:
        print(f"\n{markdown(model)}")
    others = [
        {"target": target, "kernel": name, "registers": code.registers, "spill_bytes": code.spill_bytes}
        for target in tqdm(targets, desc="compiling the other kernels", unit="target")
        for name, code in compile_surroundings(CHIPS[target].gpu)
    ]
    if arguments.json:
        modelled = [{**asdict(prediction), "speedup": prediction.speedup} for prediction in model]
        document = {"rows": [asdict(row) for row in rows], "other_kernels": others, "roofline_model": modelled}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    spilling = [other for other in others if other["spill_bytes"]]
    for other in spilling:
        print(f"{other['target']} {other['kernel']}: spills {other['spill_bytes']} bytes")
    print(f"{len(spilling)} of the {len(others)} kernels around the products spill.")
    missed = [row for row in rows if row.misses]
    for row in missed:
        print(f"{row.target} {row.kernel} {row.dtype} {row.config} member {row.member}: {', '.join(row.misses)}")
    print(f"{len(rows) - len(missed)} of {len(rows)} main loops are within their budgets.")
    half = [row for row in rows if row.dtype == "float16" and CHIPS[row.target].gpu.backend == "cuda"]
    if half:
        one, both = (max(row.alu_per_element for row in half if row.members == members) for members in (1, 2))
        print(
            f"float16, which has no budget of integer instructions: up to {one:.2f} for one member, {both:.2f} for two."
        )
    return 1 if missed or spilling else 0


if __name__ == "__main__":
    sys.exit(main())
