"""One MoE layer on a GPU: packed pairs against vLLM's own Triton kernel in BF16 and FP8, interleaved in one process.

    python -m benchmarks.gpu_moe --json FILE

All engines hold the same experts, and an output is compared with the reference engine's before its time is printed. A
call is captured once as a CUDA graph and replayed with new routing and an L2 cache full of other things; in every round
each engine computes the same routing once, and ratios are of medians over the rounds. Bandwidth is that of a large read
or copy in the same run. FP8 has a scale per block of 128 x 128 weights and rounds activations within its call; a card
without it has no such row. vLLM's log says whether its tiles were tuned for this card; what a server may choose instead
(FlashInfer, DeepGEMM, AITER) is not compared.
"""

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.gpu_moe.rows import CARD, Clock, build_engines, measure
from benchmarks.shapes import GPU_SHAPES
from vllm_puzzle.kernels import EngineError
from vllm_puzzle.tuning.layer import PackedLayer

NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 4096)
ROUTINGS = ("random", "mates")
# Beside the weights: what is read to flush, captured graphs, and one expert in float32 for the reference engine.
SPARE_BYTES = 8e9


def _print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        tqdm.write(
            f"{row['shape']:<14}{row['num_tokens']:>5} {row['routing']:<7}{row['engine']:<7}{row['us_median']:>9.1f} "
            f"us {row['gb_per_s']:>6.0f} GB/s ={row['share_of_bandwidth']:>5.0%} of {row['card_gb_per_s']:.0f}  "
            f"{row['ratio_vs_bf16']:>5.2f} x bf16"
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_moe", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows go")
    names = [shape.name for shape in GPU_SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--tokens", nargs="+", type=int, default=NUM_TOKENS, metavar="M", help="tokens in a call")
    arguments = parser.parse_args()
    if min(arguments.tokens) < 1:
        parser.error("--tokens takes numbers of at least 1")
    if not torch.cuda.is_available():
        parser.exit(1, f"{parser.prog} measures a CUDA or ROCm card, and torch finds none here.\n")
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    shapes = [shape for shape in GPU_SHAPES if shape.name in arguments.shapes]
    with torch.inference_mode(), tqdm(total=len(shapes) * len(arguments.tokens) * 2, disable=None) as progress:
        clock = Clock()
        for shape in shapes:
            free, needed = torch.cuda.mem_get_info()[0], 4 * shape.num_experts * shape.expert_elements + SPARE_BYTES
            if free < needed:
                tqdm.write(f"{shape.name} is left out: it needs {needed / 1e9:.0f} GB and {free / 1e9:.0f} GB are free")
                continue
            layer = PackedLayer(shape, CARD.device)
            engines = build_engines(layer)
            for num_tokens, routing in product(arguments.tokens, ROUTINGS):
                try:
                    new = list(measure(shape, layer, engines, num_tokens, routing, clock))
                except EngineError as error:
                    parser.exit(1, f"{error}\n")
                rows += new
                _print_rows(new)
                progress.update()
                if arguments.json:
                    arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            del layer, engines
            torch.cuda.empty_cache()
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
