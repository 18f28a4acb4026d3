"""Triton's interpreter on a CPU in the card's place, with a clock that says nothing of a card."""

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
        """The first is timed, and stands for all: an interpreter's time is worth no second look."""
        works = list(works)
        begin = time.perf_counter()
        works[0]()
        return [(time.perf_counter() - begin) * 1e6] * len(works)
