"""`vllm-puzzle tune` where there is no GPU."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from tests.tiny import build_tiny
from vllm_puzzle.cli import main
from vllm_puzzle.kernels.triton.configs import Config, load_configs
from vllm_puzzle.kernels.triton.target import INTERPRETED
from vllm_puzzle.tuning import tuner
from vllm_puzzle.tuning.card import Call, Card
from vllm_puzzle.tuning.gpu import gpu_of
from vllm_puzzle.tuning.search import Found
from vllm_puzzle.tuning.shape import LayerShape, read_shape
from vllm_puzzle.tuning.tuner import TuneRequest, start_of, tune

# With a GPU, Triton compiles in this process.
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")
SIZES = ["--num-experts", "8", "--top-k", "2", "--hidden-size", "64", "--intermediate-size", "32"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    source, packed = build_tiny("qwen3_moe", folder / "source"), folder / "packed"
    assert main(["convert", str(source), str(packed)]) == 0
    return packed


@contextmanager
def exits(status: int) -> Iterator[None]:
    with pytest.raises(SystemExit) as exit_info:
        yield
    assert exit_info.value.code == status


def test_help_waits_for_neither_torch_nor_triton() -> None:
    script = (
        "import sys; from vllm_puzzle.cli import main_of\n"
        "try:\n    main_of('tune', ['--help'])\n"
        "finally:\n    assert not {'torch', 'triton', 'transformers'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "PACKED" in run.stdout


def test_json_has_the_shape_of_every_other_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *SIZES, "--top-k", "9", "--json"]) == 1
    output = json.loads(capsys.readouterr().out)
    assert output["command"] == "tune"
    assert output["path"] is None
    assert output["error"].startswith("a token cannot have 9 of 8 experts")


def test_a_packed_checkpoint_says_what_to_tune_for(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    shape, dtype = read_shape(packed)
    assert shape == LayerShape(
        packed.name,
        num_experts=config["num_local_experts"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["moe_intermediate_size"],
        top_k=config["num_experts_per_tok"],
    )
    assert dtype == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([*SIZES], "torch .* finds none here; run it on the machine that will serve"),
        ([*SIZES, "--tensor-parallel", "5"], "--tensor-parallel 5 does not divide the intermediate size 32"),
        ([*SIZES, "--top-k", "9"], "a token cannot have 9 of 8 experts; correct --top-k"),
        (SIZES[:6], "give a packed checkpoint, or --intermediate-size too"),
        (["nowhere"], "nowhere/config.json cannot be read"),
        (["nowhere", *SIZES], "leave out --num-experts"),
    ],
)
def test_what_cannot_be_tuned_is_one_sentence(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tuner, "tune", lambda *_: pytest.fail("it began to work"))
    assert main(["tune", *arguments]) == 1
    output, error = capsys.readouterr()
    assert (output, error.count("\n")) == ("", 1)
    assert re.search(sentence, error)


def test_a_source_checkpoint_is_refused(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(packed.parent / "source")]) == 1
    assert "is not that of a packed checkpoint; give the folder that convert wrote" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tokens=0", "--seconds=-1", "--jobs=many"])
def test_numbers_are_checked(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with exits(2):
        main(["tune", *SIZES, option])
    assert "is not a positive whole number" in capsys.readouterr().err


class Interpreter(Card):
    """Triton's interpreter, where every call takes as long and nothing but the defaults runs."""

    device = torch.device("cpu")
    most_calls = 1

    def __init__(self, *defaults: Config) -> None:
        self._defaults = defaults

    def capture(self, calls: Sequence[Call]) -> tuple[Callable[[], None], list[torch.Tensor]]:
        (call,) = calls
        assert isinstance(call, partial)
        if call.args[-1] not in self._defaults:
            raise OutOfResources(2, 1, "shared memory")
        return (lambda: None), [call()]

    def times(self, works: Iterable[Callable[[], object]], before: object = None) -> list[float]:
        return [10.0 for _ in works]


@interpreted
def test_the_file_has_what_was_found_and_keeps_what_it_had(tmp_path: Path) -> None:
    shape = LayerShape("", num_experts=4, hidden_size=32, intermediate_size=16, top_k=2)
    gpu = gpu_of(Interpreter.device)
    card = Interpreter(*(start_of(gpu, shape, num_tokens) for num_tokens in (1, 2, 3)))
    reported = []

    def report(num_tokens: int, found: Found) -> None:
        reported.append(num_tokens)

    tuned = tune(card, TuneRequest(shape, (1, 3), "bfloat16", 1000), tmp_path, report=report, compile_ahead=False)
    assert tuned.path.name == "E-4_N-16_device_name-interpreter_dtype-puzzlemoe.json"
    assert reported == [1, 3]
    assert load_configs(tuned.path) == {tokens: start_of(gpu, shape, tokens) for tokens in (1, 3)}
    for found in tuned.found.values():
        assert (found.us, found.num_measured, found.wrong, found.finished) == (10.0, 1, (), True)
        assert found.num_failed > 10
    tune(card, TuneRequest(shape, (2,), "bfloat16", 1000), tmp_path, compile_ahead=False)
    assert list(load_configs(tuned.path)) == [1, 2, 3]


@interpreted
def test_without_time_there_is_nothing_to_save(tmp_path: Path) -> None:
    shape = LayerShape("", num_experts=4, hidden_size=32, intermediate_size=16, top_k=2)
    tuned = tune(Interpreter(), TuneRequest(shape, (1,), "bfloat16", 0), tmp_path, compile_ahead=False)
    assert tuned.found == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.heavy
@interpreted
def test_candidates_are_compiled_ahead_for_as_long_as_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    shape = LayerShape("", num_experts=4, hidden_size=32, intermediate_size=16, top_k=2)
    start = start_of(gpu_of(Interpreter.device), shape, 1)
    tuned = tune(Interpreter(start), TuneRequest(shape, (1,), "bfloat16", 15), tmp_path / "tiles", workers=1)
    assert load_configs(tuned.path) == {1: start}
    assert not tuned.found[1].finished
    assert {"gate_up_kernel", "down_kernel"} <= {path.stem for path in (tmp_path / "cache").rglob("*.cubin")}
