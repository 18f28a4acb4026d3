"""From a shape to a file of the fastest tiles: what `vllm-puzzle tune` does."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_puzzle.kernels.triton.configs import Config, default_config, file_name, load_configs

from .candidates import Limits
from .card import Card
from .compiling import CompilePool, compile_call
from .gpu import Gpu, gpu_of
from .layer import PackedLayer
from .measuring import Measurement
from .search import Found, Prepare, as_they_are, search
from .shape import LayerShape

NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Tuned:
    """The file, and what was found for each number of tokens that there was time for."""

    path: Path
    found: dict[int, Found]


def save(path: Path, configs: dict[int, Config]) -> None:
    """Writes a file of configurations by number of tokens, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    entries = {key: configs[key].model_dump() for key in sorted(configs)}
    try:
        temporary.write_text(json.dumps(entries, indent=4) + "\n", encoding="utf-8")
        # What it remembers of an earlier file is not what was written.
        load_configs.cache_clear()
        assert load_configs(temporary) == configs
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def limits_of(gpu: Gpu, shape: LayerShape, num_tokens: int) -> Limits:
    return Limits(shape, num_tokens, gpu.shared_memory, gpu.warp_size, gpu.num_sms, warp_groups=gpu.family == "sm90")


def start_of(gpu: Gpu, shape: LayerShape, num_tokens: int) -> Config:
    """Where a search begins: the default, whatever was tuned before."""
    return default_config(gpu.target, shape.call_sizes(num_tokens))


@dataclass(frozen=True)
class TuneRequest:
    """What to tune for, and how long to search.

    Attributes:
        shape: of this rank: `intermediate_size` is its part.
        all_tokens: the numbers of tokens of a call, each with a search of its own.
        dtype: of activations, bfloat16 or float16.
        seconds: the most that all searches take together; each has an equal share of what is left.
    """

    shape: LayerShape
    all_tokens: Sequence[int]
    dtype: str
    seconds: float


def tune(
    card: Card,
    request: TuneRequest,
    folder: Path,
    workers: int | None = None,
    report: Callable[[int, Found], None] = lambda num_tokens, found: None,
    compile_ahead: bool = True,
) -> Tuned:
    """Searches for each number of tokens in turn, and saves after each; entries for others stay.

    Args:
        folder: of the file that is written.
        workers: how many processes compile; None, one a core save one.
        report: what to tell after each search.
        compile_ahead: not where nothing is compiled, as in Triton's interpreter.

    Raises:
        EngineError: the card cannot run the kernels, a default computes something wrong, or the file that is there is
            not valid.
        OSError: the file cannot be written.
    """
    end = time.monotonic() + request.seconds
    gpu, shape = gpu_of(card.device), request.shape
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(shape.num_experts, shape.intermediate_size, gpu.device_name)
    configs = dict(load_configs(path)) if path.exists() else {}
    found = {}
    with CompilePool(gpu, workers) if compile_ahead else nullcontext() as pool, torch.inference_mode():
        layer = PackedLayer(shape, card.device)
        for place, num_tokens in enumerate(request.all_tokens):
            now = time.monotonic()
            if now >= end:
                break
            measurement = Measurement(card, layer, shape, num_tokens, getattr(torch, request.dtype))
            found[num_tokens] = search(
                measurement,
                start_of(gpu, shape, num_tokens),
                limits_of(gpu, shape, num_tokens),
                _compiled_by(pool, gpu, shape, num_tokens, request.dtype) if pool else as_they_are,
                now + (end - now) / (len(request.all_tokens) - place),
            )
            configs[num_tokens] = found[num_tokens].config
            save(path, configs)
            report(num_tokens, found[num_tokens])
    return Tuned(path, found)


def _compiled_by(pool: CompilePool, gpu: Gpu, shape: LayerShape, num_tokens: int, dtype: str) -> Prepare:
    def prepare(configs: Sequence[Config], end: float) -> Iterator[tuple[Config, bool]]:
        tasks = [(gpu, shape, (num_tokens,), dtype, config.model_dump()) for config in configs]
        for done in pool.run(compile_call, tasks, end):
            yield configs[done.index], done.failure is None

    return prepare
