"""The CPU engine as a library: sanitizers, what it is built from, choosing a level, memory while loading."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_puzzle.kernels import EngineError, choose_engine
from vllm_puzzle.kernels.cpu import Isa, choose_isa, empty_slots, library, tile_slots_, unusable, usable_isas
from vllm_puzzle.kernels.cpu.build import BuildError, build_library

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_the_enums_are_those_of_the_abi() -> None:
    text = (Path(library.__file__).parent / "csrc" / "abi.h").read_text()
    enums = dict(re.findall(r"enum PuzzleMoe(\w+) : int\d+_t \{(.*?)\};", text, re.DOTALL))
    for enum in (Isa, library.IsaStatus, library.Dtype, library.IdType, library.Activation, library.Refusal):
        declared = {name: int(value) for name, value in re.findall(r"PUZZLEMOE_(\w+) = (-?\d+)", enums[enum.__name__])}
        declared.pop("NUM_ISAS", None)
        assert declared == {member.name: member.value for member in enum}


def runtime_of(sanitizer: str) -> str:
    """The compiler's own runtime library for a sanitizer; a process that is not instrumented preloads it."""
    return subprocess.run(["g++", f"-print-file-name=lib{sanitizer}.so"], capture_output=True, text=True).stdout.strip()


@pytest.mark.heavy
def test_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    built = tmp_path / "libpuzzlemoe_cpu.so"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    build_library(built, ["-O1", "-g", "-Wall", "-Wextra", "-Werror", *sanitizers, "-DPUZZLEMOE_EMULATE_TILES"])
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime_of('asan')}:{runtime_of('ubsan')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.sanitized", str(built)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    # With the tiles emulated, what runs AVX512-VBMI runs the AMX kernels too.
    levels = [isa.name.lower() for isa in usable_isas() if isa is not Isa.AMX_BF16]
    emulated = ["amx_bf16"] if Isa.AVX512_VBMI in usable_isas() else []
    assert run.stdout.split() == levels + emulated


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="no no-such-compiler; install g\\+\\+ 11 or newer, or set CXX"):
        build_library(tmp_path / "library.so")


def test_a_library_that_was_not_built_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "LIBRARY_PATH", tmp_path / "nowhere.so")
    for function in (library.load_library, unusable):
        function.cache_clear()
    try:
        with pytest.raises(EngineError, match=r"nowhere.so is missing.*or set VLLM_PUZZLE_ENGINE=reference"):
            choose_engine(CPU, torch.bfloat16)
    finally:
        for function in (library.load_library, unusable):
            function.cache_clear()


def test_the_most_capable_level_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PUZZLE_ENGINE", raising=False)
    monkeypatch.delenv("VLLM_PUZZLE_CPU_ISA", raising=False)
    assert choose_engine(CPU, torch.bfloat16).name == f"cpu-{max(usable_isas()).name.lower()}"
    assert choose_engine(CPU, torch.float32).name == "cpu-portable"
    assert choose_engine(CPU, torch.float16).name == "cpu-portable"
    assert choose_engine(torch.device("xpu"), torch.bfloat16).name == "reference"


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in usable_isas():
        monkeypatch.setenv("VLLM_PUZZLE_CPU_ISA", isa.name.lower())
        assert choose_engine(CPU, torch.bfloat16).name == f"cpu-{isa.name.lower()}"
    monkeypatch.setenv("VLLM_PUZZLE_ENGINE", "reference")
    assert choose_engine(CPU, torch.bfloat16).name == "reference"
    monkeypatch.setenv("VLLM_PUZZLE_ENGINE", "cpu")
    with pytest.raises(EngineError, match="VLLM_PUZZLE_ENGINE=cpu cannot compute on cuda"):
        choose_engine(torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("VLLM_PUZZLE_ENGINE", "fast", "=fast is not an engine; choose auto, cpu, triton or reference"),
        ("VLLM_PUZZLE_CPU_ISA", "avx10", "=avx10 is not a level; choose auto, portable, avx2, "),
    ],
)
def test_what_does_not_exist_is_refused(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(EngineError, match=f"{variable}{message}"):
        choose_engine(CPU, torch.bfloat16)


def without_amx(isa: Isa) -> str | None:
    return "this CPU does not have it" if isa is Isa.AMX_BF16 else None


def without_vbmi(isa: Isa) -> str | None:
    return "this CPU does not have it" if isa in (Isa.AVX512_VBMI, Isa.AMX_BF16) else None


def test_the_level_follows_from_the_machine_and_the_dtype() -> None:
    assert choose_isa("auto", torch.bfloat16, without_amx) is Isa.AVX512_VBMI
    assert choose_isa("auto", torch.bfloat16, without_vbmi) is Isa.AVX512_BF16
    assert choose_isa("auto", torch.float16, without_amx) is Isa.PORTABLE
    assert choose_isa("avx512", torch.bfloat16, without_amx) is Isa.AVX512
    with pytest.raises(
        EngineError, match=r"=amx_bf16 cannot be used: this CPU does not have it; .* avx512_bf16, avx512_vbmi$"
    ):
        choose_isa("amx_bf16", torch.bfloat16, without_amx)
    with pytest.raises(EngineError, match=r"=avx512_vbmi cannot be used: this CPU .* can use .* avx512, avx512_bf16$"):
        choose_isa("avx512_vbmi", torch.bfloat16, without_vbmi)
    with pytest.raises(EngineError, match="computes in bfloat16 and the model runs in float16; choose auto or port"):
        choose_isa("avx512", torch.float16, without_amx)


@pytest.mark.heavy
def test_slots_are_tiled_in_place() -> None:
    """Tiling 128 MB of slots of 16 MB raises the process's peak by no more than two slots."""
    script = """
import resource, torch
from vllm_puzzle.kernels.cpu import empty_slots, tile_slots_
tile_slots_(empty_slots(1, 64, 32), empty_slots(1, 32, 32))
w13, w2 = (empty_slots(8, 2048, 2048).fill_(1), empty_slots(8, 2048, 1024).fill_(1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tile_slots_(w13, w2)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    slot_bytes = 2 * (2048 * 2048 + 2048 * 1024)
    assert 0 <= int(run.stdout) <= 2 * slot_bytes


@pytest.mark.heavy
def test_codes_are_ordered_in_place() -> None:
    """Ordering 52 MB of experts of 6.5 MB raises the process's peak by no more than two experts."""
    script = """
import resource, torch
from vllm_puzzle.kernels import ENGINES
engine = ENGINES["cpu-portable"]
engine.prepare_codes(*engine.allocate_codes([8], [8], 32, 32), 1, 1)
w13, w2 = engine.allocate_codes([8] * 8, [5] * 8, 2048, 2048)
for matrices in (w13, w2):
    matrices.codes.fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
engine.prepare_codes(w13, w2, 1, 1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0 <= int(run.stdout) <= 2 * (2048 * 2048 + 2048 * 1024 * 5 // 8)


def test_sizes_that_are_no_multiple_of_32_are_refused() -> None:
    with pytest.raises(ValueError, match=r"w2 must be contiguous int16 .* multiples of 32; it is .*\[1, 33, 32\]"):
        tile_slots_(empty_slots(1, 64, 32), empty_slots(1, 33, 32))
