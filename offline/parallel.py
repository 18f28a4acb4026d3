"""Units written side by side by processes of one machine."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from .job import Job
from .units import LayerTokens, Unit, UnitResult, write_unit

Enter = Callable[[Unit], LayerTokens | None]
"""What calibration knows of a unit; called for every unit, in their order."""


def write_units(
    job: Job, units: list[Unit], directory: Path, enter: Enter, num_processes: int
) -> Iterator[tuple[Unit, UnitResult]]:
    """Every unit, in their order, as soon as it is written; the same bytes whatever `num_processes` is.

    Raises:
        CheckpointError, OSError: as `write_unit`; a process that was killed is an OSError.
    """
    # Without tokens every sum is over one row or by one thread. Products of tokens are summed in another order by
    # another number of threads, so these stay as they are in one process.
    threads = torch.get_num_threads()
    if job.calibrator is None:
        threads = max(1, threads // num_processes)
    there = replace(job, calibrator=None, token_ids=None)
    with ProcessPoolExecutor(num_processes, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        waiting: deque[tuple[Unit, Future[UnitResult]]] = deque()
        try:
            for unit in units:
                waiting.append((unit, pool.submit(write_unit, there, unit, directory, enter(unit))))
                # One more than there are processes, so that none waits; each holds a layer's tokens.
                if len(waiting) > num_processes:
                    yield _first(waiting)
            while waiting:
                yield _first(waiting)
        except BrokenProcessPool:
            raise OSError("a process that was writing a layer was killed; is there memory for as many?") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _first(waiting: "deque[tuple[Unit, Future[UnitResult]]]") -> tuple[Unit, UnitResult]:
    unit, future = waiting.popleft()
    return unit, future.result()
