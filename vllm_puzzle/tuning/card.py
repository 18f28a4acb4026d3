"""The card as a stopwatch: calls captured in a graph, replays timed."""

from collections.abc import Callable, Iterable, Sequence

import torch

Call = Callable[[], torch.Tensor]


class Card:
    """A CUDA or ROCm device; what stands in for one where there is none gives the same methods."""

    device = torch.device("cuda")
    most_calls = 8
    """That are worth having in one graph."""

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, calls: Sequence[Call]) -> tuple[Callable[[], None], list[torch.Tensor]]:
        """A graph of all calls, one after the other: what replays it, and the tensors that each replay writes."""
        for call in calls:
            call()  # Loads what it needs, which a capture cannot.
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [call() for call in calls]
        return graph.replay, outputs

    def times(self, works: Iterable[Callable[[], object]], before: Callable[[], object] | None = None) -> list[float]:
        """The microseconds of each; `before` runs ahead of each and is not timed."""
        events = []
        for work in works:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if before is not None:
                before()
            begin.record()
            work()
            end.record()
            events.append((begin, end))
        self.synchronize()
        return [begin.elapsed_time(end) * 1e3 for begin, end in events]
