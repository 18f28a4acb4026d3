"""One MoE layer on a CPU: packed pairs against vLLM's BF16, FP8, INT8 and INT4 kernels, interleaved in one process.

    python -m benchmarks.cpu_moe --json FILE

Layers rotate over more memory than any cache. In every round each engine computes the same routing once; ratios are of
medians over the rounds, to the fastest of vLLM's BF16 kernels. Each row also has what bounds it: the time to read the
weights at the bandwidth measured in the same rounds, and the time of the products at the rate of a large BF16 GEMM.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.cpu_moe.peers import has_amx, has_quantized
from benchmarks.cpu_moe.rows import LOADS, THREADS, Limits, build_layers, check_agreement, measure
from benchmarks.shapes import CPU_SHAPES


def _print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"{row['shape']:<17}{row['threads']:>2} thr {row['num_tokens']:>5} {row['routing']:<7}{row['engine']:<16}"
            f"{row['ms_median']:>9.2f} ms {row['gb_per_s']:>6.1f} GB/s ={row['share_of_bandwidth']:>5.0%} of "
            f"{row['read_gb_per_s']:.1f}  {row['ratio_vs_bf16']:>5.2f} x bf16  ({row['bound']}; GEMM "
            f"{row['gemm_gmac_per_s']:.0f} GMAC/s)",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_moe", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the rows go")
    arguments = parser.parse_args()
    arguments.json.touch()
    if not has_quantized():
        print("vLLM has no FP8, INT8 and INT4 kernels for this CPU: those peers are left out")
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    agreement = {}
    with torch.inference_mode(), tqdm(total=len(CPU_SHAPES) * len(THREADS) * len(LOADS), disable=None) as progress:
        for shape in CPU_SHAPES:
            layers = build_layers(shape)
            limits = Limits()
            agreement[shape.name] = check_agreement(shape, layers[0])
            for threads in THREADS:
                for load in LOADS:
                    new = measure(shape, layers, load, threads, limits)
                    rows += new
                    progress.clear()
                    _print_rows(new)
                    progress.update()
            del layers
    print("relative difference from ours:", agreement)
    result = {"cpu_has_amx": has_amx(), "difference_from_ours": agreement, "rows": rows}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
