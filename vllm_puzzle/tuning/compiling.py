"""Compiling ahead, in processes that never see the card, into the cache where Triton looks before it compiles.

Nothing here imports torch or Triton before a worker has set its environment: Triton reads it when it is imported.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from queue import Empty, SimpleQueue
from typing import Any, Self

from .gpu import Gpu
from .shape import LayerShape

# The longest that one kernel was seen to take is a tenth of it; a worker that died returns nothing.
PATIENCE = 120.0


@dataclass(frozen=True)
class Compiled:
    """One task of `CompilePool.run`: its place among the tasks, its seconds, and why it failed, if it did."""

    index: int
    seconds: float
    failure: str | None


class CompilePool:
    """Processes in which launches compile for `gpu` and do nothing else; leaving the context ends them.

    Args:
        workers: how many; by default one a core, save one for the process that measures.
        paths: folders to prepend to `sys.path` in each.
    """

    def __init__(self, gpu: Gpu, workers: int | None = None, paths: Sequence[str] = ()) -> None:
        self._workers = workers or max(1, len(os.sched_getaffinity(0)) - 1)
        self._pool = get_context("spawn").Pool(self._workers, _start_worker, (gpu, tuple(paths)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()

    def run(
        self, function: Callable[..., object], tasks: Sequence[tuple[Any, ...]], end: float = float("inf")
    ) -> Iterator[Compiled]:
        """What became of each call `function(*task)`, as they are done; `end`, of `time.monotonic`, cuts it short.

        Where a worker dies, its task is missing from the results.

        Args:
            function: of a module that the workers can import.
        """
        done: SimpleQueue[Compiled] = SimpleQueue()
        waiting = iter(enumerate(tasks))

        def submit(count: int) -> None:
            for task in islice(waiting, count):
                self._pool.apply_async(_attempt, (function, task), callback=done.put)

        # No more than the workers need, so that what is cut short leaves none behind.
        submit(2 * self._workers)
        for _ in tasks:
            try:
                yield done.get(timeout=max(0.0, min(PATIENCE, end - time.monotonic())))
            except Empty:
                return
            submit(1)


def _start_worker(gpu: Gpu, paths: tuple[str, ...]) -> None:
    # Who interrupts the program ends the pool; a traceback from each worker tells nothing.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.update(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    sys.path[:0] = paths
    import torch
    from triton.runtime import driver

    from .no_device import NoDevice

    torch.set_num_threads(1)
    driver.set_active(NoDevice(gpu))


def _attempt(function: Callable[..., object], task: tuple[int, tuple[Any, ...]]) -> Compiled:
    index, arguments = task
    begin = time.perf_counter()
    try:
        function(*arguments)
        failure = None
    except Exception as error:
        # Whatever a pass of the compiler raises: the task is one that does not run.
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return Compiled(index, round(time.perf_counter() - begin, 2), failure)


def compile_call(
    gpu: Gpu,
    shape: LayerShape,
    all_tokens: Sequence[int],
    dtype: str = "bfloat16",
    config: dict[str, Any] | None = None,
    ids_dtype: str = "int32",
    num_slots: int | None = None,
) -> None:
    """Compiles, in a worker, what calls of the Triton engine launch; they read and write nothing.

    Args:
        all_tokens: one call for each.
        dtype, ids_dtype: of activations and of expert ids.
        config: `Config.model_dump()`; None, the default for each number of tokens.
        num_slots: None, that of a layer whose experts are all in pairs.
    """
    import torch

    from vllm_puzzle.kernels.triton.configs import Config
    from vllm_puzzle.kernels.triton.moe import triton_moe

    num_slots, inner = num_slots or shape.num_slots, shape.intermediate_size
    # One slot in memory stands for all.
    w13 = torch.empty(1, 2 * inner, shape.hidden_size, dtype=torch.int16).expand(num_slots, -1, -1)
    w2 = torch.empty(1, shape.hidden_size, inner, dtype=torch.int16).expand(num_slots, -1, -1)
    table = torch.zeros(shape.num_experts, dtype=torch.int32)
    for num_tokens in all_tokens:
        x = torch.empty(num_tokens, shape.hidden_size, dtype=getattr(torch, dtype))
        ids = torch.zeros(num_tokens, shape.top_k, dtype=getattr(torch, ids_dtype))
        chosen = Config.model_validate(config) if config else None
        triton_moe(x, w13, w2, table, torch.empty(ids.shape), ids, "silu", False, chosen, gpu.target)
