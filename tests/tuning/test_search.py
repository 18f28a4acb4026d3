"""The search for tile configurations where there is no GPU: measurements are made up, files are real."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_puzzle.kernels import EngineError
from vllm_puzzle.kernels.triton.configs import Config, file_name, find_config, load_configs
from vllm_puzzle.kernels.triton.target import Target
from vllm_puzzle.tuning.candidates import SHARED, STEPS, Limits, candidates
from vllm_puzzle.tuning.measuring import WrongResultError
from vllm_puzzle.tuning.search import search
from vllm_puzzle.tuning.shape import LayerShape
from vllm_puzzle.tuning.tuner import save

SHAPE = LayerShape("Qwen3-30B-A3B", num_experts=128, hidden_size=2048, intermediate_size=768, top_k=8)
TARGET = Target(family="sm90", device_name="untuned", num_sms=132, ptx=True)
LIMITS = Limits(SHAPE, num_tokens=1, shared_memory=227 * 1024, warp_size=32, num_sms=132, warp_groups=True)
START = find_config(TARGET, SHAPE.call_sizes(1))
# Differs from START in every field that is searched.
GATE_UP = {"block_rows": 64, "block_k": 64, "split_k": 4, "num_warps": 8, "num_stages": 5}
DOWN = {"block_rows": 32, "block_k": 64, "split_k": 2, "num_warps": 2, "num_stages": 4}
PRODUCTS = {"gate_up": START.gate_up.model_copy(update=GATE_UP), "down": START.down.model_copy(update=DOWN)}
BEST = START.model_copy(update=PRODUCTS | {"members": 1, "block_tokens": 16, "weights_first": False})


def distance(config: Config, other: Config) -> int:
    """The number of fields that differ."""
    pairs = [(config, other), (config.gate_up, other.gate_up), (config.down, other.down)]
    names = [set(SHARED), *[set(START.gate_up.model_dump())] * 2]
    return sum(getattr(a, name) != getattr(b, name) for (a, b), own in zip(pairs, names, strict=True) for name in own)


def test_the_search_finds_what_is_best_in_every_field() -> None:
    found = search(lambda config: 10.0 + distance(config, BEST), START, LIMITS)
    assert (found.config, found.us, found.us_before) == (BEST, 10.0, 10.0 + distance(START, BEST))
    assert (found.num_failed, found.wrong, found.finished) == (0, (), True)


@pytest.mark.parametrize("others", [lambda config: 10.0, lambda config: 9.95, lambda config: 50.0, lambda config: None])
def test_the_start_stays_unless_something_is_faster(others: Callable[[Config], float | None]) -> None:
    found = search(lambda config: 10.0 if config == START else others(config), START, LIMITS)
    assert (found.config, found.us, found.us_before) == (START, 10.0, 10.0)


def test_what_does_not_run_is_counted_and_passed_over() -> None:
    found = search(lambda config: None if config.members == 1 else 10.0 + distance(config, BEST), START, LIMITS)
    assert found.config == BEST.model_copy(update={"members": 2})
    shared = candidates(START, None, SHARED, LIMITS)
    assert found.num_failed == sum(candidate.members == 1 for candidate in shared)
    with pytest.raises(EngineError, match="does not run"):
        search(lambda config: None, START, LIMITS)


def test_what_did_not_compile_is_not_measured() -> None:
    def prepare(configs: Sequence[Config], end: float) -> Iterable[tuple[Config, bool]]:
        return ((config, config.members == 2) for config in configs)

    def measure(config: Config) -> float:
        assert config.members == 2
        return 10.0 + distance(config, BEST)

    found = search(measure, START, LIMITS, prepare)
    assert found.config == BEST.model_copy(update={"members": 2})
    assert found.num_failed > 0


def test_a_wrong_result_is_told_and_never_chosen() -> None:
    def measure(config: Config) -> float:
        if config.members == 1:
            raise WrongResultError("differs by 0.5")
        return 10.0 + distance(config, BEST)

    found = search(measure, START, LIMITS)
    assert found.config.members == 2
    assert found.wrong
    assert all('"members":1' in sentence and "differs by 0.5" in sentence for sentence in found.wrong)
    with pytest.raises(EngineError, match=r"differs by 0.5: a mistake of the kernels"):
        search(measure, BEST, LIMITS)


def test_time_that_is_over_leaves_the_best_so_far() -> None:
    calls = []

    def measure(config: Config) -> float:
        calls.append(config)
        return 10.0

    found = search(measure, START, LIMITS, end=time.monotonic())
    assert (found.config, found.finished, calls) == (START, False, [START])


@pytest.mark.parametrize(
    ("members", "block_tokens", "weights_first", "compiles"),
    [
        (1, 64, True, True),
        (2, 64, True, True),
        (1, 128, True, True),
        (2, 32, False, True),
        (1, 64, False, False),
        (2, 64, False, False),
        (1, 128, False, False),
    ],
)
def test_what_needs_more_shared_memory_than_there_is_is_no_candidate(
    members: int, block_tokens: int, weights_first: bool, compiles: bool
) -> None:
    """As Triton 3.6.0 and 3.7.1 compile three stages of these for sm90."""
    tile = START.gate_up.model_copy(
        update={"block_rows": 256, "block_k": 128, "split_k": 1, "num_warps": 8, "num_stages": 3}
    )
    shared = {"members": members, "block_tokens": block_tokens, "weights_first": weights_first}
    config = START.model_copy(update={**shared, "gate_up": tile, "down": tile})
    assert LIMITS.allow(config, "gate_up") == LIMITS.allow(config, "down") == compiles


@pytest.mark.parametrize("num_tokens", [1, 64, 4096])
def test_candidates_can_run_and_are_valid(num_tokens: int) -> None:
    limits = replace(LIMITS, num_tokens=num_tokens)
    start = find_config(TARGET, SHAPE.call_sizes(num_tokens))
    steps = [candidates(start, part, space, limits) for part, space in STEPS]
    assert all(steps)
    everything = [candidate for step in steps for candidate in step]
    assert start not in everything
    for config in everything:
        assert Config.model_validate_json(config.model_dump_json()) == config
        for tile, k in ((config.gate_up, SHAPE.hidden_size), (config.down, SHAPE.intermediate_size)):
            staged = 2 * (tile.block_rows + config.members * config.block_tokens) * tile.block_k
            assert staged * (tile.num_stages - 1) <= 227 * 1024
            assert tile.block_rows * config.block_tokens * config.members / (32 * tile.num_warps) <= 128
            parts_k, rest = divmod(-(-k // tile.block_k), tile.split_k)
            assert tile.split_k == 1 or (parts_k >= 2 and not rest)


def test_the_nearest_candidates_come_first() -> None:
    part, space = STEPS[1]
    assert part == "gate_up"
    changed = [distance(candidate, START) for candidate in candidates(START, part, space, LIMITS)]
    assert changed[0] == 1
    assert changed[-1] > 1


def test_the_engine_finds_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    device = "NVIDIA RTX PRO 6000 (Blackwell/Server), 96=GB"
    path = tmp_path / file_name(SHAPE.num_experts, SHAPE.intermediate_size, device)
    assert path.parent == tmp_path
    assert set(path.name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
    save(path, {64: START, 4: BEST})
    assert load_configs(path) == {4: BEST, 64: START}
    named = replace(TARGET, device_name=device)
    found = [find_config(named, SHAPE.call_sizes(num_tokens)) for num_tokens in (1, 33, 500)]
    assert found == [BEST, BEST, START]


def test_an_interrupted_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "configs.json"
    save(path, {4: START})
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(path, {4: BEST})
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
