"""How much time and memory a conversion takes on the machine at hand, estimated before it starts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..wording import duration, size
from .method import Method

# The default method is the best one within either.
MINUTES_PER_BILLION_WEIGHTS = 60.0
MINUTES_IN_ALL = 15.0

# A column takes about 15 operations, each 5 to 10 microseconds where they are launched one by one.
SECONDS_PER_COLUMN = 1.5e-4
# Temporaries in bytes that are bounded whatever the model's size.
BOUNDED_TEMPORARIES = 1 << 28

# Products of a probe that keeps a CPU busy for some 0.1 s; elementwise work for as long.
_PROBE_SIZE = 1024
_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Speed:
    """What a device does in a second: floating-point operations of float32 products, and losses of element pairs."""

    products: float
    elements: float

    @classmethod
    def measure(cls, device: torch.device) -> "Speed":
        """The speed of a device, by a short probe of each kind of work."""
        a, b = torch.randn(2, _PROBE_SIZE, _PROBE_SIZE, device=device)
        x = torch.rand(_ELEMENTS, device=device)
        products = _rate(lambda: a @ b, 2 * _PROBE_SIZE**3, device)
        # The loss of an element pair is about a dozen passes like these three.
        elements = _rate(lambda: torch.minimum((x - x * x).square(), x), _ELEMENTS / 3, device)
        return cls(products, elements)


@dataclass(frozen=True)
class Estimate:
    """The cost of a conversion: `seconds` in all, `num_bytes` the most memory at once beside the process itself."""

    seconds: float
    num_bytes: int
    expert_weights: int

    @property
    def minutes_per_billion(self) -> float:
        return self.seconds / 60 / (self.expert_weights / 1e9)

    @property
    def is_reasonable(self) -> bool:
        return self.minutes_per_billion <= MINUTES_PER_BILLION_WEIGHTS or self.seconds <= 60 * MINUTES_IN_ALL

    def __str__(self) -> str:
        rate = f"{self.minutes_per_billion:.1f} minutes a billion weights"
        return f"about {duration(self.seconds)} ({rate}), {size(self.num_bytes)} of memory"


def _rate(work: Callable[[], object], amount: float, device: torch.device) -> float:
    work()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return amount / sorted(times)[2]


def choose_method(estimates: Sequence[tuple[Method, Estimate]]) -> tuple[Method, Estimate]:
    """The first method that takes a reasonable time, with its estimate; the last one where none does."""
    return next((each for each in estimates if each[1].is_reasonable), estimates[-1])
