"""Coordinate descent over tiles, within a time."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vllm_puzzle.kernels import EngineError
from vllm_puzzle.kernels.triton.configs import Config

from .candidates import STEPS, Limits, candidates
from .measuring import WrongResultError

# What is gained by less is noise.
LEAST_GAIN = 0.01

Measure = Callable[[Config], float | None]
Prepare = Callable[[Sequence[Config], float], Iterable[tuple[Config, bool]]]
"""Makes configurations ready until a time of `time.monotonic`; gives each as it is ready, and whether it can run."""


def as_they_are(configs: Sequence[Config], end: float) -> Iterable[tuple[Config, bool]]:
    """The `Prepare` that leaves compiling to the first call."""
    return ((config, True) for config in configs)


@dataclass(frozen=True)
class Found:
    """What a search ends with.

    Attributes:
        us, us_before: microseconds of `config` and of the start.
        num_measured, num_failed: how many configurations ran, and how many did not.
        wrong: what some computed, in words: a mistake of the kernels or of the compiler.
        finished: whether there was time for all that was to be tried.
    """

    config: Config
    us: float
    us_before: float
    num_measured: int
    num_failed: int
    wrong: tuple[str, ...]
    finished: bool


def search(
    measure: Measure, start: Config, limits: Limits, prepare: Prepare = as_they_are, end: float = float("inf")
) -> Found:
    """Coordinate descent from `start`; the result is `start` or faster.

    Each step has an equal share of the time that is left.

    Args:
        measure: a configuration's microseconds, None where it does not run.
        end: when to stop, of `time.monotonic`.

    Raises:
        EngineError: `start` does not run, or computes something else than the reference engine.
    """
    prepared = list(prepare([start], float("inf")))
    try:
        us_before = measure(start) if prepared and prepared[0][1] else None
    except WrongResultError as error:
        raise EngineError(
            f"{start.model_dump_json()} {error}: a mistake of the kernels or of the compiler, to be fixed first"
        ) from None
    if us_before is None:
        raise EngineError(f"there is nothing to start from, {start.model_dump_json()} does not run on this card")
    best, us, num_measured, num_failed, wrong, finished = start, us_before, 1, 0, [], True
    for step, (part, space) in enumerate(STEPS):
        until = time.monotonic() + (end - time.monotonic()) / (len(STEPS) - step)
        waiting = candidates(best, part, space, limits)
        left = len(waiting)
        for candidate, runs in prepare(waiting, until):
            if time.monotonic() > until:
                break
            left -= 1
            try:
                taken = measure(candidate) if runs else None
            except WrongResultError as error:
                wrong.append(f"{candidate.model_dump_json()} {error}")
                continue
            if taken is None:
                num_failed += 1
                continue
            num_measured += 1
            if taken < (1 - LEAST_GAIN) * us:
                best, us = candidate, taken
        finished &= left == 0
    return Found(best, us, us_before, num_measured, num_failed, tuple(wrong), finished)
