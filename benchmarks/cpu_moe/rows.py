"""Timing the engines of one layer, round by round, and the row that each of them gets."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.cpu_moe.engine import Engine
from benchmarks.cpu_moe.ours import Coded, Packed
from benchmarks.cpu_moe.peers import build_peers, left_out
from benchmarks.cpu_moe.zentorch import build_zentorch
from benchmarks.shapes import QWEN3_30B_A3B
from vllm_puzzle.format import CODE_BITS, unpack
from vllm_puzzle.kernels.cpu import Isa, empty_slots, usable_isas
from vllm_puzzle.tuning.layer import draw, random_words
from vllm_puzzle.tuning.shape import LayerShape

ROTATED_BYTES = 1_500_000_000
# Slots whose values differ; the others of a layer repeat them.
DISTINCT_SLOTS = 4
# The widths of codes that are measured of a shape, and of the others.
CODED_BITS = {QWEN3_30B_A3B: CODE_BITS}
OTHERS_BITS = (6,)
# The probed product is (GEMM_ROWS, GEMM_SIZE) by (GEMM_SIZE, GEMM_SIZE).
GEMM_ROWS, GEMM_SIZE = 512, 2048
THREADS = (1, 2)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Load:
    """How many tokens a call has, and how they are routed: `random` or `mates`, see `vllm_puzzle.tuning.layer.draw`."""

    num_tokens: int
    routing: str = "random"

    @property
    def rounds(self) -> int:
        """How many calls are timed."""
        return 41 if self.num_tokens <= 4 else 21 if self.num_tokens <= 64 else 9 if self.num_tokens <= 256 else 5


LOADS = (
    Load(1),
    Load(1, "mates"),
    Load(4),
    Load(4, "mates"),
    *(Load(num_tokens) for num_tokens in (16, 32, 64, 256, 1024)),
)


def build_layers(shape: LayerShape, rotated_bytes: int = ROTATED_BYTES) -> tuple[list[list[Engine]], list[str]]:
    """The engines of each layer, packed pairs first; at least two layers, and `rotated_bytes` of BF16 experts in all.

    Returns:
        The layers, and a sentence for every peer that cannot run here.
    """
    distinct = min(DISTINCT_SLOTS, shape.num_slots)
    repeat = shape.num_slots // distinct
    w13 = random_words(distinct, 2 * shape.intermediate_size, shape.hidden_size, CPU)
    w2 = random_words(distinct, shape.hidden_size, shape.intermediate_size, CPU)
    most = max(load.num_tokens for load in LOADS)
    first: list[Engine] = [Packed.from_words(w13.repeat(repeat, 1, 1), w2.repeat(repeat, 1, 1))]
    first += [Coded.random(shape, bits, most) for bits in CODED_BITS.get(shape, OTHERS_BITS)]
    dense = [_unpacked(words).repeat(repeat, 1, 1) for words in (w13, w2)]
    zen, missing = build_zentorch(*dense)
    first += build_peers(*dense) + zen
    count = max(2, -(-rotated_bytes // (2 * shape.num_experts * shape.expert_elements)))
    missing += [sentence] if (sentence := left_out()) else []
    return [first, *([engine.copy() for engine in first] for _ in range(count - 1))], missing


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """BF16 experts of slots of pairs, mates beside each other."""
    return torch.stack([unpack(words, member) for member in range(2)], dim=1).flatten(0, 1)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


class Limits:
    """What the machine gives: read bandwidth and products, probed again in every round.

    Attributes:
        gb_per_s: of each probe, 10^9 bytes read a second.
        gmac_per_s: of each probe, 10^9 multiplications and additions a second.
    """

    def __init__(self, gemm_size: int = GEMM_SIZE) -> None:
        # The CPU engine's memory is on huge pages; so is this, or the page tables would be measured.
        self._memory = empty_slots(1, 1 << 14, 1 << 14).fill_(1).view(torch.int64)
        # Without BF16 instructions torch takes seconds for BF16, and engines multiply in float32.
        dtype = torch.bfloat16 if Isa.AVX512_BF16 in usable_isas() else torch.float32
        self._matrix = torch.randn(gemm_size, gemm_size).to(dtype)
        self.gb_per_s: list[float] = []
        self.gmac_per_s: list[float] = []

    def probe(self) -> None:
        """Reads the memory and multiplies once each."""
        self.gb_per_s.append(self._memory.numel() * 8 / _seconds(self._memory.sum) / 1e9)
        rows = self._matrix[:GEMM_ROWS]
        self.gmac_per_s.append(rows.shape[0] * self._matrix.numel() / _seconds(lambda: rows @ self._matrix) / 1e9)


@dataclass(frozen=True)
class _Machine:
    """What the machine gave while one load ran, medians over the rounds."""

    gb_per_s: float
    gmac_per_s: float


def measure(
    shape: LayerShape, layers: list[list[Engine]], load: Load, threads: int, limits: Limits
) -> list[dict[str, Any]]:
    """One row per engine; docs/cpu.md describes the columns."""
    torch.set_num_threads(threads)
    limits.gb_per_s.clear()
    limits.gmac_per_s.clear()
    seconds, moved = _run_rounds(shape, layers, load, limits)
    machine = _Machine(statistics.median(limits.gb_per_s), statistics.median(limits.gmac_per_s))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    peers = {
        "ratio_vs_bf16": _fastest(medians, "bf16"),
        "ratio_vs_fp8": _fastest(medians, "fp8"),
        "ratio_vs_int": _fastest(medians, "int"),
    }
    what = {
        "shape": shape.name,
        "threads": threads,
        "num_tokens": load.num_tokens,
        "routing": load.routing,
    }
    macs = load.num_tokens * shape.top_k * shape.expert_elements
    return [
        {**what, "engine": name, **_figures(times, statistics.mean(moved[name]), macs, peers, machine)}
        for name, times in seconds.items()
    ]


def _fastest(medians: Mapping[str, float], kind: str) -> float | None:
    """The median of the fastest peer of a kind, of vLLM's or zentorch's."""
    return min(
        (median for name, median in medians.items() if name.removeprefix("zentorch_").startswith(kind)), default=None
    )


def _run_rounds(
    shape: LayerShape, layers: list[list[Engine]], load: Load, limits: Limits
) -> tuple[Mapping[str, list[float]], Mapping[str, list[float]]]:
    """The seconds of each engine in each round, and the bytes that it had to move; the first round warms up."""
    seconds: dict[str, list[float]] = {engine.name: [] for engine in layers[0]}
    moved: dict[str, list[float]] = defaultdict(list)
    x = torch.randn(load.num_tokens, shape.hidden_size).bfloat16()
    for turn in range(load.rounds + 1):
        ids = draw(shape, load.num_tokens, load.routing)
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
                    units.numel() * shape.expert_elements * engine.bytes_per_weight + 2 * x.numel() * x.element_size()
                )
    return seconds, moved


def _figures(
    times: list[float], num_bytes: float, macs: int, peers: Mapping[str, float | None], machine: _Machine
) -> dict[str, Any]:
    """The figures of one engine, from its seconds in each round.

    Args:
        macs: multiplications and additions of a call.
        peers: by column, the median seconds that ratios are of; None where there is no such peer.
    """
    median = statistics.median(times)
    gb_per_s = num_bytes / median / 1e9
    memory_ms, compute_ms = num_bytes / machine.gb_per_s / 1e6, macs / machine.gmac_per_s / 1e6
    return {
        "ms_median": round(median * 1e3, 3),
        "ms_min": round(min(times) * 1e3, 3),
        "bytes_moved": round(num_bytes),
        "gb_per_s": round(gb_per_s, 2),
        "share_of_bandwidth": round(gb_per_s / machine.gb_per_s, 3),
        **{column: peer and round(peer / median, 3) for column, peer in peers.items()},
        "read_gb_per_s": round(machine.gb_per_s, 2),
        "gemm_gmac_per_s": round(machine.gmac_per_s, 1),
        "memory_ms": round(memory_ms, 3),
        "compute_ms": round(compute_ms, 3),
        "bound": "memory" if memory_ms > compute_ms else "products",
    }


def check_agreement(shape: LayerShape, engines: Iterable[Engine]) -> dict[str, float]:
    """The relative difference of peers' outputs from packed pairs', which shows that they compute the same experts.

    Coded experts are others; that they are computed rightly is for the tests of the operator.
    """
    ids = draw(shape, 4)
    x, weights = torch.randn(4, shape.hidden_size).bfloat16(), torch.rand(ids.shape)
    same = [engine for engine in engines if not isinstance(engine, Coded)]
    ours, *others = ((engine.name, engine.run(x, weights, ids).float()) for engine in same)
    return {name: round(((output - ours[1]).norm() / ours[1].norm()).item(), 4) for name, output in others}
