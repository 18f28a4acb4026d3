"""One MoE layer on a CPU: packed pairs and coded experts against vLLM's and zentorch's kernels, interleaved.

    python -m benchmarks.cpu_moe --json FILE

Layers rotate over more memory than any cache. In every round each engine computes the same routing once; ratios are of
medians over the rounds, to the fastest BF16 kernel of a peer. Each shape has a process of its own. Each row also has
what bounds it: the time to read the weights at the bandwidth measured in the same rounds, and the time of the products
at the rate of a large GEMM.
"""

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.cpu_moe.peers import has_amx
from benchmarks.cpu_moe.rows import LOADS, THREADS, Limits, build_layers, check_agreement, measure
from benchmarks.shapes import CPU_SHAPES
from vllm_puzzle.tuning.shape import LayerShape


def _print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"{row['shape']:<17}{row['threads']:>2} thr {row['num_tokens']:>5} {row['routing']:<7}{row['engine']:<16}"
            f"{row['ms_median']:>9.2f} ms {row['gb_per_s']:>6.1f} GB/s ={row['share_of_bandwidth']:>5.0%} of "
            f"{row['read_gb_per_s']:.1f}  {row['ratio_vs_bf16']:>5.2f} x bf16  ({row['bound']}; GEMM "
            f"{row['gemm_gmac_per_s']:.0f} GMAC/s)",
            flush=True,
        )


def measure_shape(shape: LayerShape) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of a shape, printed as they come, and how far its peers are from us."""
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode(), tqdm(total=len(THREADS) * len(LOADS), desc=shape.name, disable=None) as progress:
        layers, missing = build_layers(shape)
        progress.clear()
        print(*(f"{shape.name}: {sentence}" for sentence in missing), sep="\n", flush=True)
        agreement = check_agreement(shape, layers[0])
        limits = Limits()
        for threads in THREADS:
            for load in LOADS:
                new = measure(shape, layers, load, threads, limits)
                rows += new
                progress.clear()
                _print_rows(new)
                progress.update()
    return rows, agreement


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_moe", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the rows go")
    arguments = parser.parse_args()
    arguments.json.touch()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        results = list(pool.map(measure_shape, CPU_SHAPES))
    agreement = {shape.name: its for shape, (_, its) in zip(CPU_SHAPES, results, strict=True)}
    print("relative difference from ours:", agreement)
    rows = [row for its, _ in results for row in its]
    result = {"cpu_has_amx": has_amx(), "difference_from_ours": agreement, "rows": rows}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
