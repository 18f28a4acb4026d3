"""Searches the Triton engine's tile configurations for one layer's shape on the card at hand, and saves the fastest.

    python -m benchmarks.tune_gpu --num-experts E --top-k K --hidden-size H --intermediate-size N

For each number of tokens the search descends from the engine's default: first the fields that both products share, then
those of gate-up, then those of down. A configuration is measured as a CUDA graph of the whole call, replayed with
random routing and an L2 cache full of other things; its output is held against the reference engine. The file gets the
name under which the engine looks for it, and keeps what it had for other numbers of tokens.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from triton.compiler.compiler import max_shared_mem
from triton.errors import TritonError

from benchmarks.gpu_moe import DEVICE, Clock, PackedLayer, capture, draw, relative_difference
from benchmarks.roofline import MoEShape
from vllm_puzzle.kernels import REFERENCE, EngineError
from vllm_puzzle.kernels.triton import current_target, triton_moe
from vllm_puzzle.kernels.triton.configs import Config, file_name, find_config, load_configs
from vllm_puzzle.kernels.triton.routing import most_blocks

Part = Literal["gate_up", "down"]
Space = dict[str, tuple[int, ...]]

NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SHARED: Space = {"members": (1, 2), "block_tokens": (8, 16, 32, 64, 128), "weights_first": (False, True)}
# One after the other, since all combinations would take hours to compile; how a sum can be split depends on the blocks.
PRODUCT: tuple[Space, ...] = (
    {"block_rows": (32, 64, 128, 256), "block_k": (32, 64, 128, 256), "split_k": tuple(range(1, 17))},
    {"num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5)},
)
ACCUMULATOR_REGISTERS = 128
PROGRAMS_PER_SM = 4
ROUNDS = 20
# What is gained by less is noise.
LEAST_GAIN = 0.01
MAX_DIFFERENCE = 1e-2


@dataclass(frozen=True)
class Limits:
    """What one call asks for, and what the card has; shared memory is in bytes, of one program."""

    shape: MoEShape
    num_tokens: int
    shared_memory: int
    warp_size: int
    num_sms: int

    def allow(self, config: Config, part: Part) -> bool:
        """Whether one of the products can fit the card, and its sum has equal parts that are worth adding up."""
        if part == "gate_up":
            tile, k, rows = config.gate_up, self.shape.hidden_size, 2 * self.shape.intermediate_size
        else:
            tile, k, rows = config.down, self.shape.intermediate_size, self.shape.hidden_size
        # The pipeline holds one stage less than its depth in shared memory, or more, and always one.
        staged = 2 * (tile.block_rows + config.members * config.block_tokens) * tile.block_k
        if staged * max(1, tile.num_stages - 1) > self.shared_memory:
            return False
        accumulators = tile.block_rows * config.block_tokens * config.members
        if accumulators > ACCUMULATOR_REGISTERS * self.warp_size * tile.num_warps:
            return False
        if tile.split_k == 1:
            return True
        num_slots, steps = -(-self.shape.num_experts // 2), -(-k // tile.block_k)
        most = most_blocks(self.num_tokens * self.shape.top_k, num_slots, config.members, config.block_tokens)
        programs = -(-rows // tile.block_rows) * min(num_slots, most)
        half_is_enough = tile.split_k // 2 * programs >= PROGRAMS_PER_SM * self.num_sms
        return steps % tile.split_k == 0 and steps >= 2 * tile.split_k and not half_is_enough


def candidates(config: Config, part: Part | None, space: Space, limits: Limits) -> Iterator[Config]:
    """What differs from `config` in some fields, of a product or shared, in all their combinations that are allowed."""
    fields: dict[str, Any] = config.model_dump()
    for values in product(*space.values()):
        changed = dict(zip(space, values, strict=True))
        candidate = Config.model_validate(fields | (changed if part is None else {part: fields[part] | changed}))
        parts: tuple[Part, ...] = ("gate_up", "down") if part is None else (part,)
        if candidate != config and all(limits.allow(candidate, each) for each in parts):
            yield candidate


@dataclass(frozen=True)
class Found:
    """The fastest, its microseconds and those of the start; how many configurations ran, and how many did not."""

    config: Config
    us: float
    us_before: float
    num_measured: int
    num_failed: int


def search(measure: Callable[[Config], float | None], start: Config, limits: Limits) -> Found:
    """Coordinate descent from `start`; the result is `start` or faster.

    Args:
        measure: a configuration's microseconds, None where it does not run.

    Raises:
        EngineError: `start` does not run.
    """
    us_before = measure(start)
    if us_before is None:
        raise EngineError(f"there is nothing to start from, {start.model_dump_json()} does not run on this card")
    best, us, num_measured, num_failed = start, us_before, 1, 0
    parts: tuple[Part, ...] = ("gate_up", "down")
    for part, space in [(None, SHARED), *product(parts, PRODUCT)]:
        for candidate in tqdm(list(candidates(best, part, space, limits)), part or "shared", leave=False, disable=None):
            taken = measure(candidate)
            if taken is None:
                num_failed += 1
                continue
            num_measured += 1
            if taken < (1 - LEAST_GAIN) * us:
                best, us = candidate, taken
    return Found(best, us, us_before, num_measured, num_failed)


class Measurement:
    """Measures configurations on the card, all with the same tokens and routing."""

    def __init__(self, layer: PackedLayer, shape: MoEShape, num_tokens: int, dtype: torch.dtype, clock: Clock) -> None:
        self._draws = torch.stack([draw(shape, num_tokens, "random") for _ in range(ROUNDS)]).to(DEVICE)
        self._ids = self._draws[-1].clone()
        x = torch.randn(num_tokens, shape.hidden_size, device=DEVICE).to(dtype)
        weights = torch.rand(self._ids.shape, device=DEVICE)
        self._expected = layer.run(x, weights, self._ids, REFERENCE)
        tensors = (x, layer.w13, layer.w2, layer.slot_of_expert, weights, self._ids)
        self._call = partial(triton_moe, *tensors, "silu", False)
        self._clock = clock

    def __call__(self, config: Config) -> float | None:
        """Median microseconds; None if it does not compile or lacks resources.

        Raises:
            EngineError: it computes something else than the reference engine.
        """
        try:
            graph, output = capture(partial(self._call, config))
        except (TritonError, torch.OutOfMemoryError):
            return None
        except RuntimeError as error:
            # How Triton's passes fail; anything else, such as an illegal access, is a mistake to be seen.
            if "PassManager::run failed" not in str(error):
                raise
            return None
        taken = []
        for drawn in self._draws:
            self._ids.copy_(drawn)
            taken += self._clock.times([graph.replay])
        difference = relative_difference(output, self._expected)
        # Written so that NaN is refused as well.
        if not difference <= MAX_DIFFERENCE:
            raise EngineError(
                f"{config.model_dump_json()} differs from the reference engine by {difference:.3g} relative, more than "
                f"{MAX_DIFFERENCE:g}: a mistake of the kernels or of the compiler, to be mended first"
            )
        return statistics.median(taken)


def save(path: Path, configs: dict[int, Config]) -> None:
    """Writes a file of configurations by number of tokens, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    entries = {key: configs[key].model_dump() for key in sorted(configs)}
    try:
        temporary.write_text(json.dumps(entries, indent=4) + "\n")
        # What it remembers of an earlier file is not what was written.
        load_configs.cache_clear()
        assert load_configs(temporary) == configs
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def tune(shape: MoEShape, all_tokens: Sequence[int], dtype: torch.dtype, folder: Path) -> Path:
    """The file; it is saved after each number of tokens."""
    target = current_target(DEVICE)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(shape.num_experts, shape.intermediate_size, target.device_name)
    configs = dict(load_configs(path)) if path.exists() else {}
    layer, clock = PackedLayer(shape), Clock()
    shared_memory = max_shared_mem(torch.cuda.current_device())
    warp_size = torch.cuda.get_device_properties(DEVICE).warp_size
    sizes = (shape.num_experts, layer.w2.shape[0], shape.hidden_size, shape.intermediate_size, shape.top_k)
    for num_tokens in all_tokens:
        # No file is found for a card without a name: an entry for other numbers of tokens is no place to start from.
        start = find_config(replace(target, device_name=""), *sizes, num_tokens)
        limits = Limits(shape, num_tokens, shared_memory, warp_size, target.num_sms)
        found = search(Measurement(layer, shape, num_tokens, dtype, clock), start, limits)
        configs[num_tokens] = found.config
        save(path, configs)
        print(
            f"{num_tokens:>5} tokens: {found.us:.1f} us, default {found.us_before:.1f} us, {found.num_measured} "
            f"configurations measured, {found.num_failed} did not run",
            flush=True,
        )
    return path


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_gpu", description=__doc__.splitlines()[0])
    for name in ("num-experts", "top-k", "hidden-size", "intermediate-size"):
        parser.add_argument(f"--{name}", type=_positive, required=True, metavar="N", help="as in config.json")
    parser.add_argument("--tensor-parallel", type=_positive, default=1, metavar="N", help="ranks that share an expert")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of activations")
    parser.add_argument("--tokens", type=_positive, nargs="+", default=NUM_TOKENS, metavar="N", help="in one call")
    wanted = os.environ.get("VLLM_TUNED_CONFIG_FOLDER")
    where = "default: $VLLM_TUNED_CONFIG_FOLDER, else here"
    parser.add_argument("--output", type=Path, default=Path(wanted or "."), metavar="FOLDER", help=where)
    arguments = parser.parse_args()
    if arguments.top_k > arguments.num_experts:
        parser.error("--top-k is larger than --num-experts")
    intermediate_size, rest = divmod(arguments.intermediate_size, arguments.tensor_parallel)
    if rest:
        parser.error("--tensor-parallel does not divide --intermediate-size")
    if not torch.cuda.is_available():
        parser.exit(1, f"{parser.prog} tunes for a CUDA or ROCm card, and torch finds none here.\n")
    torch.manual_seed(0)
    shape = MoEShape("", arguments.num_experts, arguments.hidden_size, intermediate_size, arguments.top_k)
    try:
        with torch.inference_mode():
            path = tune(shape, arguments.tokens, getattr(torch, arguments.dtype), arguments.output)
    except (EngineError, OSError) as error:
        parser.exit(1, f"{error}\n")
    print(f"Saved {path}.")
    if not wanted or Path(wanted).resolve() != path.parent.resolve():
        print(f"Serve with VLLM_TUNED_CONFIG_FOLDER={path.parent.resolve()}, or the engine will not find it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
