"""An engine is one object in one registry, and importing it costs nothing."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from tests.kernels.cases import Case
from tests.kernels.engines import CODED, ON_CPU
from vllm_puzzle.format import WORD16
from vllm_puzzle.kernels import ENGINES, REFERENCE, Arguments, Engine, EngineError, choose_engine

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Doubling(Engine):
    """Twice what the reference engine computes."""

    name = family = "doubling"
    dtypes = (torch.float32,)

    def suits(self, device: torch.device) -> bool:
        return False

    def choose(self, device: torch.device, dtype: torch.dtype) -> Engine:
        if dtype not in self.dtypes:
            raise EngineError("doubling computes in float32 alone")
        return self

    def run(self, *arguments: *Arguments) -> torch.Tensor:
        return 2 * ENGINES[REFERENCE].run(*arguments)


class Illiterate(Doubling):
    layouts = ()


def test_a_new_engine_is_chosen_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "doubling", Doubling())
    assert choose_engine(CPU, torch.float32).name != "doubling"
    monkeypatch.setenv("VLLM_PUZZLE_ENGINE", "doubling")
    engine = choose_engine(CPU, torch.float32)
    case = Case(dtype=torch.float32)
    w13, w2 = engine.allocate(len(case.w13), 32, case.intermediate_size)
    w13.copy_(case.w13)
    w2.copy_(case.w2)
    engine.prepare(w13, w2, len(case.x), 2)
    assert engine.check(w13, torch.float32) is None
    got = torch.ops.vllm_puzzle.packed_moe(
        case.x, w13, w2, case.slot_of_expert, case.topk_weights, case.topk_ids, "silu", engine=engine.name
    )
    assert torch.equal(got, 2 * case.run(engine=REFERENCE))
    with pytest.raises(EngineError, match="in float32 alone"):
        choose_engine(CPU, torch.bfloat16)
    monkeypatch.setenv("VLLM_PUZZLE_ENGINE", "abacus")
    with pytest.raises(EngineError, match="choose auto, cpu, triton, reference or doubling"):
        choose_engine(CPU, torch.float32)


def test_words_that_an_engine_does_not_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "doubling", Illiterate())
    monkeypatch.setenv("VLLM_PUZZLE_ENGINE", "doubling")
    with pytest.raises(EngineError, match="doubling does not read words of 16 bits; choose another"):
        choose_engine(CPU, torch.float32, WORD16)


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_has_its_own_name(name: str) -> None:
    assert ENGINES[name].name == name
    assert name.startswith(ENGINES[name].family)
    with pytest.raises(AttributeError):
        ENGINES[name].name = "another"  # type: ignore[misc]


@pytest.mark.parametrize("name", ON_CPU)
def test_words_begin_as_zeros_padded_to_the_multiple(name: str) -> None:
    engine = ENGINES[name]
    w13, w2 = engine.allocate(num_slots=3, hidden_size=40, intermediate_size=24)
    hidden, intermediate = {1: (40, 24), 32: (64, 32)}[engine.multiple]
    assert (w13.shape, w2.shape) == ((3, 2 * intermediate, hidden), (3, hidden, intermediate))
    assert w13.dtype == w2.dtype == WORD16.dtype
    assert not w13.any()
    assert not w2.any()


@pytest.mark.parametrize("name", CODED)
def test_codes_begin_as_zeros_padded_to_the_multiple(name: str) -> None:
    engine = ENGINES[name]
    w13, w2 = engine.allocate_codes([4, 8], [6, 5], hidden_size=41, intermediate_size=24)
    hidden, intermediate = {1: (42, 24), 32: (64, 32)}[engine.multiple]
    assert (w13.scale.shape, w2.scale.shape) == ((2, 2, intermediate), (2, 2, hidden // 2))
    assert [tuple(w13.packed(expert).shape) for expert in range(2)] == [(intermediate, 8), (intermediate, 16)]
    assert [tuple(w2.packed(expert).shape) for expert in range(2)] == [(hidden // 2, 6), (hidden // 2, 5)]
    for matrices, bits in ((w13, [4, 8]), (w2, [6, 5])):
        assert matrices.index[:, 1].tolist() == bits
        assert matrices.codebook.shape == (2, 256, 2)
        assert not any(tensor.any() for tensor in (matrices.codes, matrices.codebook, matrices.scale))
        for expert in range(2):
            matrices.packed(expert)[:] = expert + 1
        assert matrices.packed(0).unique().tolist() == [1]


def test_importing_the_engines_imports_nothing_that_they_need() -> None:
    program = (
        "import sys, vllm_puzzle.kernels\n"
        "print([name for name in ('triton', 'vllm') if name in sys.modules], "
        "'libpuzzlemoe' in open('/proc/self/maps').read())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[] False\n"
