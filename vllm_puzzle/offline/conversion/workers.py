"""Units written side by side, by processes of one machine or of a Ray cluster."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from ..merging.layer import LayerTokens
from .job import Job
from .options import Workers
from .ray import RayPool
from .units import Unit, UnitResult, write_unit

Enter = Callable[[Unit], LayerTokens | None]
"""Returns what calibration knows of a unit; called for every unit, in their order."""


class _Result(Protocol):
    def result(self) -> UnitResult: ...

    def cancel(self) -> object: ...


class _Pool(Protocol):
    def submit(
        self, function: Callable[..., UnitResult], /, job: Job, unit: Unit, directory: Path, tokens: LayerTokens | None
    ) -> _Result: ...


def write_units(
    job: Job, units: list[Unit], directory: Path, enter: Enter, workers: Workers
) -> Generator[tuple[Unit, UnitResult], None, None]:
    """Every unit, in their order, as soon as it is written; the bytes do not depend on the workers.

    Raises:
        CheckpointError, OSError: as `write_unit`; a process that was killed is an OSError.
    """
    # Without tokens every sum is over one row or by one thread. Products of tokens are summed in another order by
    # another number of threads, so these stay as they are in one process.
    threads = torch.get_num_threads()
    if job.calibrator is None and workers.ray is None:
        threads = max(1, threads // workers.jobs)
    there = replace(job, calibrator=None)
    with _pool(workers, threads) as pool:
        waiting: deque[tuple[Unit, _Result]] = deque()
        try:
            for unit in units:
                waiting.append((unit, pool.submit(write_unit, there, unit, directory, enter(unit))))
                # One more than there are processes, so that none waits; each holds a layer's tokens.
                if len(waiting) > workers.jobs:
                    yield _first(waiting)
            while waiting:
                yield _first(waiting)
        except BrokenProcessPool:
            raise OSError("a process that was writing a layer was killed; is there memory for as many?") from None
        finally:
            for _, future in waiting:
                future.cancel()


def _pool(workers: Workers, threads: int) -> AbstractContextManager[_Pool]:
    if workers.ray is not None:
        return RayPool(workers.ray, threads)
    return _processes(workers.jobs, threads)


@contextmanager
def _processes(jobs: int, threads: int) -> Iterator[_Pool]:
    """Processes of this machine that end at once where the block fails, and with this process however that ends."""
    context = get_context("spawn")
    there, here = context.Pipe(duplex=False)
    with here, ProcessPoolExecutor(jobs, context, _begin, (threads, there)) as pool:
        try:
            yield _Undisturbed(pool)
        except BaseException:
            # The layers that are being written, which may take an hour, are not waited for.
            here.close()
            raise


class _Undisturbed:
    """Starts processes that ignore Ctrl-C, which a terminal sends to all of them: this process ends them."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def submit(self, function: Callable[..., UnitResult], /, *arguments: Any) -> "Future[UnitResult]":
        # A process inherits what is blocked, so not even its imports are disturbed.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(function, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(threads: int, there: Connection) -> None:
    threading.Thread(target=_end_with, args=(there,), daemon=True).start()
    # By a name of ours: vLLM's CPU worker replaces torch's function by one that no other process can be sent.
    torch.set_num_threads(threads)


def _end_with(there: Connection) -> None:
    """Ends this process when the other end of a pipe that nobody writes to is closed, or its process has died."""
    there.poll(None)
    os._exit(1)


def _first(waiting: deque[tuple[Unit, _Result]]) -> tuple[Unit, UnitResult]:
    unit, future = waiting.popleft()
    return unit, future.result()
