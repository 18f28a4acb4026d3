"""The packed engine and its peers in turn, each as a graph of several calls with routings of their own.

Consecutive calls need other experts, more than the L2 cache holds, and their launches overlap as they do in a model.
"""

import statistics
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch

from benchmarks.gpu_moe.peers import Engine, bytes_moved
from benchmarks.gpu_session.engines import engines, sorts_by_library
from benchmarks.gpu_session.workload import Workload
from vllm_puzzle.kernels import REFERENCE
from vllm_puzzle.tuning.card import Card
from vllm_puzzle.tuning.layer import PackedLayer, draw, relative_difference
from vllm_puzzle.tuning.shape import LayerShape

Say = Callable[..., None]

# The numbers of tokens at which both mates of a slot are drawn together too, and kernels are timed one by one.
MATES = (1, 16)
BY_KERNEL = (1, 16, 64, 1024)
FP8_CAPABILITY = (8, 9)


def time_shape(card: Card, workload: Workload, shape: LayerShape, peer: bool, say: Say) -> None:
    """A line for every number of tokens, routing and engine; times are microseconds of a call, GB are 10^9 bytes."""
    fp8 = card.device.type == "cuda" and torch.cuda.get_device_capability() >= FP8_CAPABILITY
    layer = PackedLayer(shape, card.device)
    # A vLLM's kernels are compiled, never interpreted.
    ready = list(engines(layer, peer and card.device.type == "cuda", fp8))
    if peer and card.device.type == "cuda":
        # Where there is none, its rows say so.
        with suppress(ImportError):
            say(what="peer", sorts_by_library=sorts_by_library())
    for num_tokens in workload.timed_tokens:
        for routing in ("random", "mates") if num_tokens in MATES else ("random",):
            _time_call(card, shape, layer, ready, num_tokens, routing, say)


def _time_call(
    card: Card, shape: LayerShape, layer: PackedLayer, ready: list[Engine], num_tokens: int, routing: str, say: Say
) -> None:
    calls = min(card.most_calls, 8 if num_tokens <= 64 else 4 if num_tokens <= 1024 else 2)
    rounds = 15 if num_tokens <= 1024 else 5
    drawn = [draw(shape, num_tokens, routing) for _ in range(calls)]
    ids = [one.to(card.device) for one in drawn]
    x = torch.randn(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=card.device)
    weights = torch.rand(ids[0].shape, device=card.device)
    expected = layer.run(x, weights, ids[-1], REFERENCE)
    base = None
    for engine in ready:
        load = {"shape": shape.name, "tokens": num_tokens, "routing": routing, "engine": engine.name}
        try:
            replay, outputs = card.capture([partial(engine.run, x, weights, one) for one in ids])
            card.times([replay] * 2)
            taken = [us / calls for us in card.times([replay] * rounds)]
        except Exception as error:
            # One peer that cannot run here costs none of the others; a poisoned process does.
            say(what="time", **load, error=repr(error)[:500])
            if "CUDA error" in str(error):
                raise
            continue
        us = statistics.median(taken)
        moved = statistics.mean(bytes_moved(shape, one, engine.bytes_per_weight, engine.per_slot) for one in drawn)
        if engine.name == "vllm_bf16":
            base = us
        difference = relative_difference(outputs[-1], expected)
        say(
            what="time",
            **load,
            us=round(us, 2),
            us_min=round(min(taken), 2),
            bytes=round(moved),
            gb_per_s=round(moved / us / 1e3, 1),
            tflops=round(2 * num_tokens * shape.top_k * shape.expert_elements / us / 1e6, 1),
            ratio_vs_vllm_bf16=round(base / us, 3) if base else None,
            difference=float(f"{difference:.3g}"),
            ok=bool(difference <= engine.tolerance),
        )
        if card.device.type == "cuda" and num_tokens in BY_KERNEL and engine.name in ("packed", "vllm_bf16"):
            say(what="kernels", **load, us=_by_kernel(replay, calls))
        del replay, outputs


def _by_kernel(replay: Callable[[], None], calls: int) -> dict[str, float]:
    """Microseconds of a call by kernel, from the profiler; less than the whole by what lies between them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        replay()
        torch.cuda.synchronize()
    return {event.key[:60]: round(event.device_time_total / calls, 2) for event in profiler.key_averages()}
