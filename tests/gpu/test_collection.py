"""What the tests of compiled kernels need: torch, Triton, pydantic and pytest. Here they are only collected."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
import pytest

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
sys.exit(pytest.main([*sys.argv[2:], "--collect-only", "-m", "gpu or not gpu", "-p", "no:cacheprovider"]))
"""
ABSENT = "vllm,openai,transformers,tokenizers,hypothesis,safetensors,huggingface_hub,scipy,tqdm,psutil,matplotlib"


def test_the_tests_of_kernels_need_neither_vllm_nor_what_converting_needs() -> None:
    command = [sys.executable, "-c", SCRIPT, ABSENT, "tests/gpu/test_kernels.py", "tests/kernels"]
    # Plug-ins of pytest that happen to be installed, hypothesis's among them.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    for test in ("tests/gpu/test_kernels.py::", "tests/kernels/test_operator.py::", "tests/kernels/test_triton.py::"):
        assert test in run.stdout
