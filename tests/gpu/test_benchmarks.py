"""The benchmarks that need a device. They need vLLM, whose kernels are the peers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


def test_the_benchmark_against_fused_moe_runs(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.gpu_moe", "--shapes", "Qwen3-30B-A3B", "--tokens", "1", "16"]
    run = subprocess.run([*command, "--json", str(rows)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    engines = {row["engine"] for row in json.loads(rows.read_text())["rows"]}
    assert {"packed", "bf16"} <= engines
