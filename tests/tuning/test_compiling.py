"""Compiling ahead where there is no GPU: real processes, real kernels, Triton's real cache."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tuning.launches import check_environment, die, fail
from vllm_puzzle.kernels.triton.configs import Config, Product
from vllm_puzzle.tuning.compiling import CompilePool, compile_call
from vllm_puzzle.tuning.gpu import HOPPER
from vllm_puzzle.tuning.shape import LayerShape

pytestmark = pytest.mark.heavy

SHAPE = LayerShape("", num_experts=8, hidden_size=64, intermediate_size=64, top_k=2)


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def config(block_k: int) -> Config:
    part = Product(block_rows=64, block_k=block_k, num_warps=4, num_stages=2)
    return Config(members=2, block_tokens=16, weights_first=True, gate_up=part, down=part)


def test_a_call_is_compiled_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    gpu = replace(HOPPER, shared_memory=20_000)
    # The second's pipeline asks for more.
    tasks = [(gpu, SHAPE, (1,), "bfloat16", config(block_k).model_dump()) for block_k in (32, 256)]
    with CompilePool(gpu, workers=1) as pool:
        first, second = sorted(pool.run(compile_call, tasks), key=lambda done: done.index)
        again = next(iter(pool.run(compile_call, tasks[:1])))
    assert (first.failure, again.failure) == (None, None)
    assert second.failure is not None
    assert "OutOfResources" in second.failure
    names = {path.stem for path in (tmp_path / "cache").rglob("*.cubin")}
    assert {"gate_up_kernel", "down_kernel", "combine_kernel", "place_kernel"} <= names


def test_workers_never_see_a_card_and_report_what_fails() -> None:
    with CompilePool(HOPPER, workers=1, paths=["/somewhere"]) as pool:
        assert [done.failure for done in pool.run(check_environment, [("/somewhere",)])] == [None]
        assert [done.failure for done in pool.run(fail, [("not this\none",)])] == ["RuntimeError: not this one"]


def test_a_worker_that_dies_takes_its_own_task_alone() -> None:
    with CompilePool(HOPPER, workers=1, paths=["/somewhere"]) as pool:
        assert list(pool.run(die, [(3,)], time.monotonic() + 2)) == []
        assert [done.failure for done in pool.run(check_environment, [("/somewhere",)])] == [None]
