"""Timing the engines of one layer on the card, and the row that each of them gets."""

import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_moe.peers import FP8_BLOCK, Engine, bytes_moved, fp8_blocks, plain_experts
from vllm_puzzle.kernels import REFERENCE, EngineError
from vllm_puzzle.tuning.card import Card
from vllm_puzzle.tuning.layer import PackedLayer, draw, relative_difference
from vllm_puzzle.tuning.shape import LayerShape

CARD = Card()
ROUNDS = 50
# Far more than any L2 cache, and long enough to read that the next launches are queued before it ends.
FLUSHED_BYTES = 1 << 30


class Clock:
    """Times what the card does, each time from an L2 cache full of other things."""

    def __init__(self) -> None:
        self._memory = torch.ones(FLUSHED_BYTES // 4, device=CARD.device)

    def times(self, works: Iterable[Callable[[], object]]) -> list[float]:
        """The microseconds of each."""
        # What was read, unlike what was written, need not be written back while the work runs.
        return CARD.times(works, self._memory.sum)

    def gb_per_s(self) -> float:
        """The card's bandwidth: the better of reading the memory and copying one half of it to the other."""
        source, target = self._memory.chunk(2)
        works = (self._memory.sum, partial(target.copy_, source))
        return FLUSHED_BYTES / min(statistics.median(self.times([work] * ROUNDS)) for work in works) / 1e3


def build_engines(layer: PackedLayer) -> list[Engine]:
    """Ours first, then BF16; they need a vLLM that was built for this card."""
    from vllm.model_executor.layers.fused_moe import fused_experts
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
    from vllm.platforms import current_platform

    w13, w2 = plain_experts(layer)
    engines = [
        Engine("packed", 2, True, 0.01, layer.run),
        Engine("bf16", 2, False, 0.01, lambda x, weights, ids: fused_experts(x, w13, w2, weights, ids)),
    ]
    if current_platform.supports_fp8():
        (q13, scale13), (q2, scale2) = (fp8_blocks(weights, current_platform.fp8_dtype()) for weights in (w13, w2))
        quant = fp8_w8a8_moe_quant_config(scale13, scale2, block_shape=[FP8_BLOCK, FP8_BLOCK])
        fp8 = partial(fused_experts, quant_config=quant)
        engines.append(Engine("fp8", 1, False, 0.2, lambda x, weights, ids: fp8(x, q13, q2, weights, ids)))
    return engines


def measure(
    shape: LayerShape, layer: PackedLayer, engines: list[Engine], num_tokens: int, routing: str, clock: Clock
) -> Iterator[dict[str, Any]]:
    """One row per engine; times are in microseconds, GB are 10^9 bytes.

    Raises:
        EngineError: an engine computes something else than the reference engine.
    """
    draws = torch.stack([draw(shape, num_tokens, routing) for _ in range(ROUNDS + 1)])
    ids = torch.empty_like(draws[0], device=CARD.device).copy_(draws[0])
    x = torch.randn(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=CARD.device)
    weights = torch.rand(ids.shape, device=CARD.device)
    captured = [CARD.capture([partial(engine.run, x, weights, ids)]) for engine in engines]
    times: list[list[float]] = [[] for _ in engines]
    for turn, drawn in enumerate(draws.to(CARD.device)):
        ids.copy_(drawn)
        for place in range(len(engines)):
            # Nobody is always the one that runs after the same neighbour.
            index = (place + turn) % len(engines)
            times[index] += clock.times([captured[index][0]])
    times = [elapsed[1:] for elapsed in times]  # The first round warms up.
    expected, bandwidth = layer.run(x, weights, ids, REFERENCE), clock.gb_per_s()
    load = {"device": torch.cuda.get_device_name(), "shape": shape.name, "num_tokens": num_tokens, "routing": routing}
    for engine, (_, (output,)), elapsed in zip(engines, captured, times, strict=True):
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
