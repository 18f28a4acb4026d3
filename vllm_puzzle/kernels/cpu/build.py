"""Compiling the CPU engine and the converter's loops: what setup.py runs at install, and the tests with sanitizers.

Loaded by path while the package is being built, so it imports nothing that is not in the standard library.
"""

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).resolve().parent
_SOURCES = _HERE / "csrc"
LIBRARY_NAME = "libpuzzlemoe_cpu.so"
PACKING_NAME = "libpuzzlemoe_packing.so"
CODING_NAME = "libpuzzlemoe_coding.so"

_COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    # Neither changes a result; without them the activations are not vectorized.
    "-fno-math-errno",
    "-fno-trapping-math",
]
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
_ISA_FLAGS = {
    "isa_avx2.cpp": _AVX2,
    "isa_avx512.cpp": _AVX512,
    "isa_avx512_bf16.cpp": [*_AVX512, "-mavx512bf16"],
    "isa_avx512_vbmi.cpp": [*_AVX512, "-mavx512bf16", "-mavx512vbmi"],
    "isa_amx_bf16.cpp": [*_AVX512, "-mavx512bf16", "-mavx512vbmi", "-mamx-tile", "-mamx-bf16"],
}


class BuildError(RuntimeError):
    """What is compiled at install could not be."""


def build_library(destination: Path, extra_flags: Sequence[str] = ()) -> None:
    """Compiles the engine into the shared library `destination`; `extra_flags` go to the compiler and the linker.

    The compiler is $CXX, else g++.

    Raises:
        BuildError: no compiler, or one that fails, with what it said.
    """
    compiler = _find_compiler()
    with tempfile.TemporaryDirectory() as folder:
        sources = sorted(_SOURCES.glob("*.cpp"))
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]

        def compile_one(source: Path, target: Path) -> None:
            flags = [*_COMMON_FLAGS, "-fopenmp", *_ISA_FLAGS.get(source.name, []), *_layout_macros(), *extra_flags]
            _run([compiler, *flags, "-c", str(source), "-o", str(target)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, sources, objects))
        destination.parent.mkdir(parents=True, exist_ok=True)
        # -fopenmp leaves libgomp to be found by its soname, so that torch's copy, already loaded, is the one used.
        link = [compiler, "-shared", "-fopenmp", "-static-libgcc", "-Wl,--as-needed", "-Wl,-z,defs", *extra_flags]
        _run([*link, *map(str, objects), "-o", str(destination)])


def build_packing(source: Path, destination: Path, extra_flags: Sequence[str] = ()) -> None:
    """Compiles the converter's packing loop, `source`, as `build_library` does the engine."""
    _build_loop(source, destination, [f"-I{_SOURCES}", *_layout_macros(), *extra_flags])


def build_coding(source: Path, destination: Path, extra_flags: Sequence[str] = ()) -> None:
    """Compiles the converter's coding loops, `source`, as `build_library` does the engine."""
    _build_loop(source, destination, ["-fopenmp", *extra_flags])


def _build_loop(source: Path, destination: Path, flags: Sequence[str]) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    # A contracted multiplication and addition would round once where torch rounds twice.
    flags = [*_COMMON_FLAGS, "-ffp-contract=off", *flags, "-shared", "-static-libgcc"]
    _run([_find_compiler(), *flags, str(source), "-o", str(destination)])


def _find_compiler() -> str:
    name = os.environ.get("CXX", "g++")
    compiler = shutil.which(name)
    if compiler is None:
        raise BuildError(
            f"the CPU engine needs a C++ compiler and there is no {name}; install g++ 11 or newer, or set CXX"
        )
    return compiler


def _layout_macros() -> list[str]:
    layout = _load("_puzzlemoe_layout", _HERE.parent.parent / "format" / "layout.py").WORD16
    return [
        f"-DPUZZLEMOE_SIGN_BITS={','.join(map(str, layout.sign_bits))}",
        f"-DPUZZLEMOE_MASK_BITS={','.join(map(str, layout.mask_bits))}",
        f"-DPUZZLEMOE_MAGNITUDE_MASK={layout.magnitude_mask}",
        f"-DPUZZLEMOE_REBIAS={layout.rebias}",
        f"-DPUZZLEMOE_MANTISSA_BITS={layout.mantissa_bits}",
    ]


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(command: list[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise BuildError(f"compiling failed: {' '.join(command)}\n{finished.stderr}")


if __name__ == "__main__":
    build_library(_HERE / LIBRARY_NAME)
    offline = _HERE.parents[1] / "offline"
    build_packing(offline / "merging" / "packing.cpp", offline / "merging" / PACKING_NAME)
    build_coding(offline / "coding" / "coding.cpp", offline / "coding" / CODING_NAME)
