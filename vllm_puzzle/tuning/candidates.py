"""Which tiles are worth trying for a call, and in which order."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import log2
from typing import Any, Literal

from vllm_puzzle.kernels.triton.configs import Config
from vllm_puzzle.kernels.triton.routing import most_blocks

from .shape import LayerShape

Part = Literal["gate_up", "down"]
Space = dict[str, tuple[int, ...]]

SHARED: Space = {"members": (1, 2), "block_tokens": (8, 16, 32, 64, 128), "weights_first": (False, True)}
# One after the other, since all combinations would take hours to compile; how a sum can be split depends on the blocks.
PRODUCT: tuple[Space, ...] = (
    {"block_rows": (32, 64, 128, 256), "block_k": (32, 64, 128, 256), "split_k": tuple(range(1, 17))},
    {"num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5)},
)
PARTS: tuple[Part, ...] = ("gate_up", "down")
STEPS: tuple[tuple[Part | None, Space], ...] = ((None, SHARED), *product(PARTS, PRODUCT))
"""What a search goes through: the fields that both products share, then those of each."""
ACCUMULATOR_REGISTERS = 128
PROGRAMS_PER_SM = 4


@dataclass(frozen=True)
class Limits:
    """What one call asks for, and what the card has.

    Attributes:
        shared_memory: bytes of it that one program can have.
        warp_groups: groups of warps multiply from shared memory while more is loaded, as on sm90.
    """

    shape: LayerShape
    num_tokens: int
    shared_memory: int
    warp_size: int
    num_sms: int
    warp_groups: bool

    def allow(self, config: Config, part: Part) -> bool:
        """Whether one of the products can fit the card, and its sum has equal parts that are worth adding up."""
        if part == "gate_up":
            tile, k, rows = config.gate_up, self.shape.hidden_size, 2 * self.shape.intermediate_size
        else:
            tile, k, rows = config.down, self.shape.intermediate_size, self.shape.hidden_size
        # The pipeline holds one stage less than its depth in shared memory, or more, and always one. A group of warps
        # takes 64 rows of its first side, and where that is the tokens, its stage is held until the product is done.
        grouped = self.warp_groups and not config.weights_first and config.block_tokens >= 64
        staged = 2 * (tile.block_rows + config.members * config.block_tokens) * tile.block_k
        if staged * (tile.num_stages if grouped else max(1, tile.num_stages - 1)) > self.shared_memory:
            return False
        accumulators = tile.block_rows * config.block_tokens * config.members
        if accumulators > ACCUMULATOR_REGISTERS * self.warp_size * tile.num_warps:
            return False
        if tile.split_k == 1:
            return True
        num_slots, steps = self.shape.num_slots, -(-k // tile.block_k)
        most = most_blocks(self.num_tokens * self.shape.top_k, num_slots, config.members, config.block_tokens)
        programs = -(-rows // tile.block_rows) * min(num_slots, most)
        half_is_enough = tile.split_k // 2 * programs >= PROGRAMS_PER_SM * self.num_sms
        return steps % tile.split_k == 0 and steps >= 2 * tile.split_k and not half_is_enough


def candidates(config: Config, part: Part | None, space: Space, limits: Limits) -> list[Config]:
    """What differs from `config` in some fields, of a product or shared (None), and is allowed; the nearest first."""
    found = list(_combinations(config, part, space, limits))
    own = config.model_dump() if part is None else getattr(config, part).model_dump()

    def distance(candidate: Config) -> float:
        fields = candidate.model_dump() if part is None else getattr(candidate, part).model_dump()
        return sum(abs(log2(1 + fields[name]) - log2(1 + own[name])) for name in space)

    return sorted(found, key=distance)


def _combinations(config: Config, part: Part | None, space: Space, limits: Limits) -> Iterator[Config]:
    fields: dict[str, Any] = config.model_dump()
    for values in product(*space.values()):
        changed = dict(zip(space, values, strict=True))
        candidate = Config.model_validate(fields | (changed if part is None else {part: fields[part] | changed}))
        parts = PARTS if part is None else (part,)
        if candidate != config and all(limits.allow(candidate, each) for each in parts):
            yield candidate
