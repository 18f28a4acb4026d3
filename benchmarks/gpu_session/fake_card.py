"""Triton's interpreter on a CPU in place of a card; its times say nothing about a card."""

import time
from collections.abc import Callable, Iterable, Sequence

import torch

from vllm_puzzle.tuning.card import Call, Card


class FakeCard(Card):
    """See `Card`; a replay computes again, into the same tensors."""

    device = torch.device("cpu")
    most_calls = 1

    def synchronize(self) -> None:
        pass

    def capture(self, calls: Sequence[Call]) -> tuple[Callable[[], None], list[torch.Tensor]]:
        outputs = [call() for call in calls]

        def replay() -> None:
            for call, output in zip(calls, outputs, strict=True):
                output.copy_(call())

        return replay, outputs

    def times(self, works: Iterable[Callable[[], object]], before: Callable[[], object] | None = None) -> list[float]:
        """The first is timed, and its time is returned for all: an interpreter's times need no median."""
        works = list(works)
        begin = time.perf_counter()
        works[0]()
        return [(time.perf_counter() - begin) * 1e6] * len(works)
