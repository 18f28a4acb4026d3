"""One MoE layer on a GPU: packed pairs against vLLM's own Triton kernel in BF16 and FP8, interleaved in one process.

    python -m benchmarks.gpu_moe --json FILE

All engines hold the same experts, and an output is held against the reference engine before its time is printed. A call
is captured once as a CUDA graph and replayed with new routing and an L2 cache full of other things; in every round each
engine computes the same routing once, and ratios are of medians over the rounds. Bandwidth is that of a large read or
copy in the same run. FP8 has a scale per block of 128 x 128 weights and rounds activations within its call; a card
without it has no such row. vLLM's log says whether its tiles were tuned for this card; what a server may choose instead
(FlashInfer, DeepGEMM, AITER) is not compared.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.roofline import SHAPES, MoEShape
from vllm_puzzle.format import pack, unpack
from vllm_puzzle.kernels import REFERENCE, TRITON, EngineError

DEVICE = torch.device("cuda")
NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 4096)
ROUTINGS = ("random", "mates")
ROUNDS = 50
# Far more than any L2 cache, and long enough to read that the next launches are queued before it ends.
FLUSHED_BYTES = 1 << 30
# Beside the weights: what is read to flush, captured graphs, and one expert in float32 for the reference engine.
SPARE_BYTES = 8e9
FP8_BLOCK = 128


class PackedLayer:
    """Random experts in packed pairs on the card: expert e is member e % 2 of slot e // 2."""

    def __init__(self, shape: MoEShape) -> None:
        num_slots = -(-shape.num_experts // 2)
        self.w13 = _random_words(num_slots, 2 * shape.intermediate_size, shape.hidden_size)
        self.w2 = _random_words(num_slots, shape.hidden_size, shape.intermediate_size)
        self.slot_of_expert = torch.arange(shape.num_experts, dtype=torch.int32, device=DEVICE)

    def run(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, engine: str = TRITON
    ) -> torch.Tensor:
        return torch.ops.vllm_puzzle.packed_moe(
            x, self.w13, self.w2, self.slot_of_expert, topk_weights, topk_ids, "silu", False, engine
        )


class Engine(NamedTuple):
    """One layer's experts in one format; `run` takes x, topk_weights and topk_ids."""

    name: str
    bytes_per_weight: int
    # Whether both experts of a pair are read at once.
    per_slot: bool
    # The relative difference from the reference engine that the format's own rounding explains.
    tolerance: float
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Clock:
    """Times what the card does, each time from an L2 cache full of other things."""

    def __init__(self) -> None:
        self._memory = torch.ones(FLUSHED_BYTES // 4, device=DEVICE)

    def times(self, works: Iterable[Callable[[], object]]) -> list[float]:
        """The microseconds of each."""
        events = []
        for work in works:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # What was read, unlike what was written, need not be written back while `work` runs.
            self._memory.sum()
            begin.record()
            work()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e3 for begin, end in events]

    def gb_per_s(self) -> float:
        """The card's bandwidth: the better of reading the memory and copying one half of it to the other."""
        source, target = self._memory.chunk(2)
        works = (self._memory.sum, partial(target.copy_, source))
        return FLUSHED_BYTES / min(statistics.median(self.times([work] * ROUNDS)) for work in works) / 1e3


def _random_words(num_slots: int, rows: int, columns: int) -> torch.Tensor:
    """(num_slots, rows, columns), int16: what merging two Gaussian matrices leaves, half shared and half exclusive."""
    words = torch.empty(num_slots, rows, columns, dtype=torch.int16, device=DEVICE)
    for slot in words:
        first, second, *signs = (torch.rand(slot.shape, device=DEVICE) < share for share in (0.75, 0.5, 0.5, 0.5))
        slot.copy_(pack(torch.randn(slot.shape, device=DEVICE).abs() * 0.02, [first, second | ~first], signs))
    return words


def _fp8(weights: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in FP8, and their scales (num_experts, rows / FP8_BLOCK, columns / FP8_BLOCK), float32."""
    rounded, scales = torch.empty_like(weights, dtype=dtype), []
    for weight, result in zip(weights, rounded, strict=True):
        blocks = weight.float().unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
        scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / torch.finfo(dtype).max
        result.copy_((blocks / scale).view(weight.shape))
        scales.append(scale[:, 0, :, 0])
    return rounded, torch.stack(scales)


def build_engines(layer: PackedLayer) -> list[Engine]:
    """Ours first, then BF16; they need a vLLM that was built for this card."""
    from vllm.model_executor.layers.fused_moe import fused_experts
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
    from vllm.platforms import current_platform

    w13, w2 = (torch.stack([unpack(slot, k) for slot in words for k in range(2)]) for words in (layer.w13, layer.w2))
    engines = [
        Engine("packed", 2, True, 0.01, layer.run),
        Engine("bf16", 2, False, 0.01, lambda x, weights, ids: fused_experts(x, w13, w2, weights, ids)),
    ]
    if current_platform.supports_fp8():
        (q13, scale13), (q2, scale2) = (_fp8(weights, current_platform.fp8_dtype()) for weights in (w13, w2))
        quant = fp8_w8a8_moe_quant_config(scale13, scale2, block_shape=[FP8_BLOCK, FP8_BLOCK])
        fp8 = partial(fused_experts, quant_config=quant)
        engines.append(Engine("fp8", 1, False, 0.2, lambda x, weights, ids: fp8(x, q13, q2, weights, ids)))
    return engines


def capture(call: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of the call, and the tensor that each replay writes."""
    call()  # Compiles what it needs, which a capture cannot.
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph, output


def draw(shape: MoEShape, num_tokens: int, routing: str) -> torch.Tensor:
    """(num_tokens, top_k), int32 expert ids: `random`, or both `mates` of each of top_k / 2 slots."""
    if routing == "random":
        return torch.rand(num_tokens, shape.num_experts).topk(shape.top_k).indices.int()
    slots = torch.rand(num_tokens, shape.num_experts // 2).topk(shape.top_k // 2).indices.int()
    return torch.stack([2 * slots, 2 * slots + 1], dim=2).flatten(1)


def bytes_moved(shape: MoEShape, ids: torch.Tensor, bytes_per_weight: int, per_slot: bool) -> int:
    """The least that must pass through the card's memory: weights that `ids` name, inputs, outputs."""
    units = (ids // 2 if per_slot else ids).unique().numel()
    return units * shape.expert_elements * bytes_per_weight + 2 * 2 * ids.shape[0] * shape.hidden_size


def relative_difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    return ((output.float() - expected.float()).norm() / expected.float().norm()).item()


def measure(
    shape: MoEShape, layer: PackedLayer, engines: list[Engine], num_tokens: int, routing: str, clock: Clock
) -> Iterator[dict[str, Any]]:
    """One row per engine; times are in microseconds, GB are 10^9 bytes.

    Raises:
        EngineError: an engine computes something else than the reference engine.
    """
    draws = torch.stack([draw(shape, num_tokens, routing) for _ in range(ROUNDS + 1)])
    ids = torch.empty_like(draws[0], device=DEVICE).copy_(draws[0])
    x = torch.randn(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=DEVICE)
    weights = torch.rand(ids.shape, device=DEVICE)
    captured = [capture(partial(engine.run, x, weights, ids)) for engine in engines]
    times: list[list[float]] = [[] for _ in engines]
    for turn, drawn in enumerate(draws.to(DEVICE)):
        ids.copy_(drawn)
        for place in range(len(engines)):
            # Nobody is always the one that runs after the same neighbour.
            index = (place + turn) % len(engines)
            times[index] += clock.times([captured[index][0].replay])
    times = [elapsed[1:] for elapsed in times]  # The first round warms up.
    expected, bandwidth = layer.run(x, weights, ids, REFERENCE), clock.gb_per_s()
    load = {"device": torch.cuda.get_device_name(), "shape": shape.name, "num_tokens": num_tokens, "routing": routing}
    for engine, (_, output), elapsed in zip(engines, captured, times, strict=True):
        difference = relative_difference(output, expected)
        # Written so that NaN is refused as well.
        if not difference <= engine.tolerance:
            raise EngineError(
                f"{shape.name}, {num_tokens} tokens, {routing}: {engine.name} differs from the reference engine by "
                f"{difference:.3g} relative, more than {engine.tolerance:g}, so that its time says nothing"
            )
        moved = [bytes_moved(shape, drawn, engine.bytes_per_weight, engine.per_slot) for drawn in draws[1:]]
        median, num_bytes = statistics.median(elapsed), statistics.mean(moved)
        gb_per_s = num_bytes / median / 1e3
        yield load | {
            "engine": engine.name,
            "us_median": round(median, 2),
            "us_min": round(min(elapsed), 2),
            "bytes_moved": round(num_bytes),
            "gb_per_s": round(gb_per_s, 1),
            "share_of_bandwidth": round(gb_per_s / bandwidth, 3),
            "card_gb_per_s": round(bandwidth, 1),
            "ratio_vs_bf16": round(statistics.median(times[1]) / median, 3),
            "difference_from_reference": round(difference, 5),
        }


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
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--tokens", nargs="+", type=int, default=NUM_TOKENS, metavar="M", help="tokens in a call")
    arguments = parser.parse_args()
    if min(arguments.tokens) < 1:
        parser.error("--tokens takes numbers of at least 1")
    if not torch.cuda.is_available():
        parser.exit(1, f"{parser.prog} measures a CUDA or ROCm card, and torch finds none here.\n")
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    shapes = [shape for shape in SHAPES if shape.name in arguments.shapes]
    with torch.inference_mode(), tqdm(total=len(shapes) * len(arguments.tokens) * 2, disable=None) as progress:
        clock = Clock()
        for shape in shapes:
            free, needed = torch.cuda.mem_get_info()[0], 4 * shape.num_experts * shape.expert_elements + SPARE_BYTES
            if free < needed:
                tqdm.write(f"{shape.name} is left out: it needs {needed / 1e9:.0f} GB and {free / 1e9:.0f} GB are free")
                continue
            layer = PackedLayer(shape)
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
