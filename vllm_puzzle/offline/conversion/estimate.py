"""How much time and memory a conversion takes on the machine at hand, estimated before it starts."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..merging.layer import TOKENS_AT_ONCE
from ..merging.recipe import Recipe
from ..wording import duration, size
from .work import Work

# The default recipe is the best one within either.
MINUTES_PER_BILLION_WEIGHTS = 60.0
MINUTES_IN_ALL = 15.0

# A column takes about 15 operations, each 5 to 10 microseconds on a device that is limited by launching them.
_SECONDS_PER_COLUMN = 1.5e-4
# Products of a probe that keeps a CPU busy for some 0.1 s; elementwise work for as long.
_PROBE_SIZE = 1024
_ELEMENTS = 1 << 22
# Temporaries that are bounded whatever the model's size.
_BLOCKS = 1 << 28


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


def estimate_conversion(recipe: Recipe, work: Work, speed: Speed) -> Estimate:
    """What a conversion costs; within a factor of two where `speed` is right."""
    shape, pairs, num_tokens = work.shape, work.pairs, work.num_tokens
    hidden, inner = shape.hidden_size, shape.intermediate_size
    layers = len(shape.moe_layers)
    expert = 3 * hidden * inner
    weights = shape.num_experts * layers * expert
    routed = num_tokens * work.top_k * layers
    through = 2 * routed * expert + 2 * num_tokens * work.dense_weights
    products = 2.0 * through
    elements = float(2 * weights)
    columns = 0
    if recipe.chooses(work.all_paired):
        # Choosing pairs, on statistics of every expert.
        products += through + 2 * 2 * routed * expert / 3
        drawn = 1 if recipe.pairing == "random" else shape.num_experts
        elements += drawn * weights / 2
    share = 2 * pairs / (shape.num_experts * layers)
    if recipe.rule.estimates_loss:
        # Statistics of the mates.
        products += share * 2 * 2 * routed * expert / 3
        elements += share * weights / 2
    if recipe.rule.sequential:
        products += 2 * through + share * 4 * 2 * routed * expert + share * 2 * routed * (hidden**2 + 2 * inner**2)
        # Two factorizations and an inverse per moment, then every column's error into those that follow.
        products += 2 * pairs * (2 * hidden**3 + 3 * inner**3) + 2 * pairs * (2 * inner * hidden**2 + hidden * inner**2)
        columns += pairs * (hidden + inner)
    if recipe.align:
        elements += 3 * hidden * float(inner) ** 2 * pairs
    seconds = products / speed.products + elements / speed.elements + columns * _SECONDS_PER_COLUMN
    return Estimate(seconds, _memory(recipe, work), weights)


def _memory(recipe: Recipe, work: Work) -> int:
    hidden, inner, num_tokens = work.shape.hidden_size, work.shape.intermediate_size, work.num_tokens
    expert = 3 * hidden * inner
    # The hidden states, what enters the experts and their output in float32; where tokens go.
    paths = 2 if recipe.rule.sequential else 1
    tokens = num_tokens * hidden * (2 * paths + 2 + 4 * paths) + num_tokens * work.top_k * 12
    tokens += min(num_tokens, TOKENS_AT_ONCE) * (6 * hidden + 8 * inner) * 4
    # Choosing pairs reads a whole layer; merging maps two experts of it and makes their words, two bytes for every
    # weight of one expert, and running tokens through it takes less.
    whole = work.layer_bytes if recipe.chooses(work.all_paired) else 0
    merging = 3 * expert * 2 + _BLOCKS
    if recipe.align:
        # Magnitudes and costs of every weight of two experts, and the loss of every neuron with every other.
        merging += 2 * expert * 4 * 2 + inner**2 * 12
    if recipe.rule.sequential:
        # The merged layer; two mates and their moments in several states; what their outputs lose, for which all tokens
        # may have been routed to them.
        merging += work.layer_bytes + 2 * expert * 4 * 6 + 2 * 4 * (hidden**2 + inner**2) * 4
        merging += 2 * num_tokens * hidden * 2
    return tokens + whole + work.jobs * merging


def choose_recipe(estimates: list[tuple[Recipe, Estimate]]) -> tuple[Recipe, Estimate]:
    """The first recipe that takes a reasonable time, with its estimate; the last one where none does."""
    return next((each for each in estimates if each[1].is_reasonable), estimates[-1])
