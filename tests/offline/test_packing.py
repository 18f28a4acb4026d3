"""The compiled loop against torch's operations: the same words, the same counts, the same refusals."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import silu

import vllm_puzzle.offline.merging.packing
from tests.offline.checkpoints import read_all
from vllm_puzzle.cli import main
from vllm_puzzle.format import FormatError
from vllm_puzzle.kernels.cpu.build import build_packing
from vllm_puzzle.offline.merging.layer import ExpertWeights
from vllm_puzzle.offline.merging.packing import LIBRARY_PATH, is_compiled
from vllm_puzzle.offline.merging.pair import ElementRule, MergeStatistics

NAMES = ["gate", "up", "down"]


@contextmanager
def uncompiled() -> Iterator[None]:
    """As if the library had not been built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_puzzle.offline.merging.packing, "LIBRARY_PATH", LIBRARY_PATH.with_name("nowhere.so"))
        yield


def pack(rule: ElementRule, experts: ExpertWeights) -> list[tuple[torch.Tensor, MergeStatistics]]:
    return list(rule.pack(experts, (0, 1), NAMES))


def pack_by_torch(rule: ElementRule, experts: ExpertWeights) -> list[tuple[torch.Tensor, MergeStatistics]]:
    with uncompiled():
        return pack(rule, experts)


def two_experts(
    intermediate_size: int, hidden_size: int, dtype: torch.dtype, generator: torch.Generator
) -> ExpertWeights:
    """Weights of every size that a word can hold and below, zeros of both signs, some of them alike or equal."""

    def matrices(rows: int, columns: int) -> list[torch.Tensor]:
        first = torch.randn(rows, columns, generator=generator)
        first *= 2.0 ** torch.randint(-20, 10, (rows, columns), generator=generator)
        second = first * (1 + torch.randn(rows, columns, generator=generator))
        kind = torch.randint(0, 8, (rows, columns), generator=generator)
        second[kind == 0] = first[kind == 0]
        second[kind == 1] = -0.0
        first[kind == 2] = 0.0
        return [first.to(dtype), second.to(dtype)]

    shape = (intermediate_size, hidden_size)
    return ExpertWeights(matrices(*shape), matrices(*shape), matrices(*shape[::-1]), silu)


@given(
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from([None, 0.0, 0.4, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_it_does_what_torch_does(
    intermediate_size: int, hidden_size: int, dtype: torch.dtype, tau: float | None, seed: int
) -> None:
    assert is_compiled()
    generator = torch.Generator().manual_seed(seed)
    experts = two_experts(intermediate_size, hidden_size, dtype, generator)

    def some(*shape: int) -> torch.Tensor:
        # Zeros: channels that no token reached.
        return torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.9)

    rows = None if tau is not None else some(2, intermediate_size, 1)
    hidden, intermediate = some(2, 1, hidden_size), some(2, 1, intermediate_size)
    rule = ElementRule(((rows, hidden), (rows, hidden), (None, intermediate)), tau)
    for (words, counted), (by_torch, expected) in zip(pack(rule, experts), pack_by_torch(rule, experts), strict=True):
        assert torch.equal(words, by_torch)
        assert (counted.elements, counted.shared, counted.kept) == (expected.elements, expected.shared, expected.kept)
        assert asdict(counted) == pytest.approx(asdict(expected), rel=1e-5)


@pytest.mark.parametrize("run", [pack, pack_by_torch])
@pytest.mark.parametrize("value", [65536.0, torch.inf, torch.nan])
@pytest.mark.parametrize("tau", [None, 0.4])
def test_what_no_word_can_hold_is_refused(tau: float | None, value: float, run: Callable[..., object]) -> None:
    experts = two_experts(3, 5, torch.bfloat16, torch.Generator().manual_seed(0))
    for matrix in experts.up:
        matrix[1, 4] = value
    ones = torch.ones(2, 1, 5)
    rule = ElementRule(((None, ones), (None, ones), (None, torch.ones(2, 1, 3))), tau)
    with pytest.raises(FormatError, match=r"^up\[1, 4\] is (65536|inf|nan)"):
        run(rule, experts)


@pytest.mark.parametrize("rule", ["paper", "saliency"])
def test_without_it_the_same_is_written_and_it_is_said(
    rule: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), str(tmp_path / "compiled"), "--rule", rule]) == 0
    assert "was not compiled" not in capsys.readouterr().err
    with uncompiled():
        assert main(["convert", str(source), str(tmp_path / "packed"), "--rule", rule]) == 0
    assert f"{LIBRARY_PATH.name} was not compiled" in capsys.readouterr().err
    compiled, packed = read_all(tmp_path / "compiled"), read_all(tmp_path / "packed")
    assert compiled.keys() == packed.keys()
    assert all(torch.equal(compiled[name], packed[name]) for name in packed)


def test_it_compiles_without_a_warning(tmp_path: Path) -> None:
    build_packing(LIBRARY_PATH.with_name("packing.cpp"), tmp_path / "packing.so", ["-Wall", "-Wextra", "-Werror"])
    assert (tmp_path / "packing.so").exists()
