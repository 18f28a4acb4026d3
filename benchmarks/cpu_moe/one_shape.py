"""All rows of one shape. A spawned process finds this by its module, which it could not if it stood in `__main__`."""

from typing import Any

import torch
from tqdm import tqdm

from benchmarks.cpu_moe.rows import LOADS, THREADS, Limits, build_layers, check_agreement, measure
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
