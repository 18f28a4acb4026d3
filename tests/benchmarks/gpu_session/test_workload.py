"""What the stages launch, and what they import to launch it."""

import os
import subprocess
import sys

from benchmarks.gpu_session.workload import REAL, tasks
from vllm_puzzle.tuning.gpu import HOPPER


def test_torch_triton_and_pydantic_are_enough() -> None:
    script = """
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"vllm", "tqdm", "transformers", "safetensors", "scipy", "yaml", "numpy"}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import benchmarks.gpu_session, vllm_puzzle.tuning
for package in (benchmarks.gpu_session, vllm_puzzle.tuning):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
from benchmarks.gpu_session.workload import REAL, tasks
from vllm_puzzle.tuning.gpu import HOPPER
print(len(list(tasks(REAL, HOPPER, peer=True))))
"""
    # As on a card: only Triton's interpreter is in need of numpy.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == len(list(tasks(REAL, HOPPER, peer=True)))


def test_the_parent_imports_neither_torch_nor_triton() -> None:
    script = "import sys, benchmarks.gpu_session.__main__; print({'torch', 'triton'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "set()\n", run.stderr


def test_everything_that_is_launched_is_compiled_first() -> None:
    found = list(tasks(REAL, HOPPER, peer=True))
    names = [task.stage for task in found]
    assert list(dict.fromkeys(names)) == [
        *("correct", "graphs", "sanitizer", "ncu"),
        *(f"times {shape.name}" for shape in REAL.shapes),
        "tune",
    ]
    # Every default, with its sums in one part and two, in both dtypes.
    checked = [task.arguments for task in found if task.stage == "correct" and task.arguments[1] == REAL.checked[0]]
    cuts = list(REAL.cuts("sm90", REAL.checked[0]))
    assert {(arguments[3], arguments[5]) for arguments in checked} == {
        ("bfloat16", "int32"),
        ("bfloat16", "int64"),
        ("float16", "int32"),
    }
    assert len(checked) == 3 * len(cuts)
