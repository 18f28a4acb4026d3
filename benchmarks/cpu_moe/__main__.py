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

from benchmarks.cpu_moe.one_shape import measure_shape
from benchmarks.cpu_moe.peers import has_amx
from benchmarks.shapes import CPU_SHAPES


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
