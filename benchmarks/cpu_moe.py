"""One MoE layer on a CPU: packed pairs against vLLM's BF16, FP8, INT8 and INT4 kernels, interleaved in one process.

    python -m benchmarks.cpu_moe --json FILE

Layers rotate over more memory than any cache. In every round each engine computes the same routing once; ratios are of
medians over the rounds, to the fastest of vLLM's BF16 kernels. Beside the figures stands what bounds them: the weights
that must be read at the read bandwidth measured in the same rounds, and the products at the rate of a large BF16 GEMM.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.cpu_peers import Engine, build_engines, has_amx, has_quantized
from vllm_puzzle.format import pack
from vllm_puzzle.kernels.cpu import empty_slots

ROTATED_BYTES = 1.5e9
# Slots whose values differ; the others of a layer repeat them.
DISTINCT_SLOTS = 4
GEMM_SIZE = 2048


@dataclass(frozen=True)
class Shape:
    """The routed experts of one layer."""

    name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int

    @property
    def expert_weights(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size


@dataclass(frozen=True)
class Load:
    """How many tokens come, and how they are routed: `random`, or to `mates` (both members of top_k / 2 slots)."""

    num_tokens: int
    routing: str = "random"

    @property
    def rounds(self) -> int:
        return 41 if self.num_tokens <= 4 else 21 if self.num_tokens <= 64 else 9 if self.num_tokens <= 256 else 5

    def draw(self, shape: Shape) -> torch.Tensor:
        """(num_tokens, top_k), int32 expert ids."""
        if self.routing == "random":
            rows = [torch.randperm(shape.num_experts)[: shape.top_k] for _ in range(self.num_tokens)]
        else:
            slots = [torch.randperm(shape.num_experts // 2)[: shape.top_k // 2] for _ in range(self.num_tokens)]
            rows = [torch.stack([2 * chosen, 2 * chosen + 1], dim=1).flatten() for chosen in slots]
        return torch.stack(rows).int()


SHAPES = (
    Shape("Qwen3-30B-A3B", num_experts=128, hidden_size=2048, intermediate_size=768, top_k=8),
    Shape("Mixtral-like", num_experts=8, hidden_size=2048, intermediate_size=4096, top_k=2),
    Shape("DeepSeek-V2-Lite", num_experts=64, hidden_size=2048, intermediate_size=1408, top_k=6),
)
LOADS = (
    Load(1),
    Load(1, "mates"),
    Load(4),
    Load(4, "mates"),
    *(Load(num_tokens) for num_tokens in (16, 32, 64, 256, 1024)),
)
THREADS = (1, 2)


def random_words(num_slots: int, rows: int, columns: int) -> torch.Tensor:
    """(num_slots, rows, columns), int16: what merging two Gaussian matrices leaves, half shared and half exclusive."""
    shape = (num_slots, rows, columns)
    first, second = torch.rand(shape) < 0.75, torch.rand(shape) < 0.5
    signs = [torch.rand(shape) < 0.5 for _ in range(2)]
    return pack(torch.randn(shape).abs() * 0.02, [first, second | ~first], signs)


def build_layers(shape: Shape) -> list[list[Engine]]:
    """By layer its engines; at least two layers, and ROTATED_BYTES of BF16 experts in all."""
    distinct = min(DISTINCT_SLOTS, shape.num_experts // 2)
    w13 = random_words(distinct, 2 * shape.intermediate_size, shape.hidden_size)
    w2 = random_words(distinct, shape.hidden_size, shape.intermediate_size)
    first = build_engines(w13, w2, repeat=shape.num_experts // (2 * distinct))
    count = max(2, -(-int(ROTATED_BYTES) // (2 * shape.num_experts * shape.expert_weights)))
    return [first, *([engine.copy() for engine in first] for _ in range(count - 1))]


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


class Limits:
    """What the machine gives: read bandwidth and BF16 products, probed again in every round."""

    def __init__(self) -> None:
        # The CPU engine's memory is on huge pages; so is this, or the page tables would be measured.
        self._memory = empty_slots(1, 1 << 14, 1 << 14).fill_(1).view(torch.int64)
        self._matrix = torch.randn(GEMM_SIZE, GEMM_SIZE).bfloat16()
        self.gb_per_s: list[float] = []
        self.gmac_per_s: list[float] = []

    def probe(self) -> None:
        self.gb_per_s.append(self._memory.numel() * 8 / _seconds(self._memory.sum) / 1e9)
        seconds = _seconds(lambda: self._matrix[:512] @ self._matrix)
        self.gmac_per_s.append(512 * GEMM_SIZE * GEMM_SIZE / seconds / 1e9)


def measure(shape: Shape, layers: list[list[Engine]], load: Load, threads: int, limits: Limits) -> list[dict[str, Any]]:
    """One row per engine; the names of the columns are in docs/cpu.md."""
    torch.set_num_threads(threads)
    limits.gb_per_s.clear()
    limits.gmac_per_s.clear()
    seconds: dict[str, list[float]] = {engine.name: [] for engine in layers[0]}
    moved: dict[str, list[float]] = {engine.name: [] for engine in layers[0]}
    x = torch.randn(load.num_tokens, shape.hidden_size).bfloat16()
    for turn in range(load.rounds + 1):
        ids = load.draw(shape)
        weights = torch.rand(ids.shape)
        active = ids.unique()
        engines = layers[turn % len(layers)]
        limits.probe()
        for place in range(len(engines)):
            # Nobody is always the one that runs after the same neighbour.
            engine = engines[(place + turn) % len(engines)]
            elapsed = _seconds(partial(engine.run, x, weights, ids))
            units = (active // 2).unique() if engine is engines[0] else active
            if turn:
                seconds[engine.name].append(elapsed)
                moved[engine.name].append(
                    units.numel() * shape.expert_weights * engine.bytes_per_weight + 2 * x.numel() * x.element_size()
                )
    bandwidth, products = statistics.median(limits.gb_per_s), statistics.median(limits.gmac_per_s)
    bf16 = min(statistics.median(times) for name, times in seconds.items() if name.startswith("bf16"))
    fp8 = statistics.median(seconds["fp8"]) if "fp8" in seconds else None
    rows = []
    for name, times in seconds.items():
        median, num_bytes = statistics.median(times), statistics.mean(moved[name])
        memory_ms = num_bytes / bandwidth / 1e6
        compute_ms = load.num_tokens * shape.top_k * shape.expert_weights / products / 1e6
        rows.append(
            {
                "shape": shape.name,
                "threads": threads,
                "num_tokens": load.num_tokens,
                "routing": load.routing,
                "engine": name,
                "ms_median": round(median * 1e3, 3),
                "ms_min": round(min(times) * 1e3, 3),
                "bytes_moved": round(num_bytes),
                "gb_per_s": round(num_bytes / median / 1e9, 2),
                "share_of_bandwidth": round(num_bytes / median / 1e9 / bandwidth, 3),
                "ratio_vs_bf16": round(bf16 / median, 3),
                "ratio_vs_fp8": round(fp8 / median, 3) if fp8 else None,
                "read_gb_per_s": round(bandwidth, 2),
                "gemm_gmac_per_s": round(products, 1),
                "memory_ms": round(memory_ms, 3),
                "compute_ms": round(compute_ms, 3),
                "bound": "memory" if memory_ms > compute_ms else "products",
            }
        )
    return rows


def check_agreement(shape: Shape, engines: Iterable[Engine]) -> dict[str, float]:
    """Every engine's relative difference from ours, which shows that they compute the same experts."""
    ids = Load(4).draw(shape)
    x, weights = torch.randn(4, shape.hidden_size).bfloat16(), torch.rand(ids.shape)
    ours, *others = ((engine.name, engine.run(x, weights, ids).float()) for engine in engines)
    return {name: round(((output - ours[1]).norm() / ours[1].norm()).item(), 4) for name, output in others}


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
    with torch.inference_mode(), tqdm(total=len(SHAPES) * len(THREADS) * len(LOADS), disable=None) as progress:
        for shape in SHAPES:
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
