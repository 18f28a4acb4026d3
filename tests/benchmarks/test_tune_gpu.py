"""The search for tile configurations where there is no GPU: measurements are made up, files are real."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks import tune_gpu
from benchmarks.roofline import SHAPES
from benchmarks.tune_gpu import PRODUCT, SHARED, Limits, Part, candidates, main, save, search
from vllm_puzzle.kernels import EngineError
from vllm_puzzle.kernels.triton.configs import Config, file_name, find_config, load_configs
from vllm_puzzle.kernels.triton.target import Target

SHAPE = SHAPES[1]
SIZES = (SHAPE.num_experts, SHAPE.num_experts // 2, SHAPE.hidden_size, SHAPE.intermediate_size, SHAPE.top_k)
TARGET = Target(family="sm90", device_name="untuned", num_sms=132, ptx=True)
LIMITS = Limits(SHAPE, num_tokens=1, shared_memory=227 * 1024, warp_size=32, num_sms=132)
START = find_config(TARGET, *SIZES, 1)
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
    assert found.num_failed == 0


@pytest.mark.parametrize("others", [lambda config: 10.0, lambda config: 9.95, lambda config: 50.0, lambda config: None])
def test_the_start_stays_unless_something_is_faster(others: Callable[[Config], float | None]) -> None:
    found = search(lambda config: 10.0 if config == START else others(config), START, LIMITS)
    assert (found.config, found.us, found.us_before) == (START, 10.0, 10.0)


def test_what_does_not_run_is_counted_and_passed_over() -> None:
    found = search(lambda config: None if config.members == 1 else 10.0 + distance(config, BEST), START, LIMITS)
    assert found.config == BEST.model_copy(update={"members": 2})
    shared = list(candidates(START, None, SHARED, LIMITS))
    assert found.num_failed == sum(candidate.members == 1 for candidate in shared)
    with pytest.raises(EngineError, match="does not run"):
        search(lambda config: None, START, LIMITS)


@pytest.mark.parametrize("num_tokens", [1, 64, 4096])
def test_candidates_can_run_and_are_valid(num_tokens: int) -> None:
    limits = replace(LIMITS, num_tokens=num_tokens)
    start = find_config(TARGET, *SIZES, num_tokens)
    parts: tuple[Part, ...] = ("gate_up", "down")
    spaces = [(None, SHARED), *product(parts, PRODUCT)]
    everything = [candidate for part, space in spaces for candidate in candidates(start, part, space, limits)]
    assert len(everything) > 30
    assert start not in everything
    for config in everything:
        assert Config.model_validate_json(config.model_dump_json()) == config
        for tile, k in ((config.gate_up, SHAPE.hidden_size), (config.down, SHAPE.intermediate_size)):
            staged = 2 * (tile.block_rows + config.members * config.block_tokens) * tile.block_k
            assert staged * (tile.num_stages - 1) <= 227 * 1024
            assert tile.block_rows * config.block_tokens * config.members / (32 * tile.num_warps) <= 128
            parts_k, rest = divmod(-(-k // tile.block_k), tile.split_k)
            assert tile.split_k == 1 or (parts_k >= 2 and not rest)


def test_the_engine_finds_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    path = tmp_path / file_name(SHAPE.num_experts, SHAPE.intermediate_size, "tuned")
    save(path, {64: START, 4: BEST})
    assert load_configs(path) == {4: BEST, 64: START}
    found = [find_config(replace(TARGET, device_name="tuned"), *SIZES, num_tokens) for num_tokens in (1, 33, 500)]
    assert found == [BEST, BEST, START]


def test_an_interrupted_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "configs.json"
    save(path, {4: START})
    before = path.read_bytes()
    monkeypatch.setattr("benchmarks.tune_gpu.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(path, {4: BEST})
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("option", "status", "sentence"),
    [
        ("--tokens=1", 1, "torch finds none here"),
        ("--tokens=0", 2, "not a positive whole number"),
        ("--tensor-parallel=5", 2, "does not divide"),
    ],
)
def test_without_a_card_it_says_so_and_does_nothing(
    option: str, status: int, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tune_gpu, "tune", lambda *_: pytest.fail("it began to work"))
    sizes = ["--num-experts", "8", "--top-k", "2", "--hidden-size", "64", "--intermediate-size", "32"]
    monkeypatch.setattr("sys.argv", ["tune_gpu", *sizes, option])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == status
    error = capsys.readouterr().err
    assert sentence in error
    assert status == 2 or error.count("\n") == 1
