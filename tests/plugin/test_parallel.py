"""Two ranks give the tokens of one: tensor parallel and expert parallel, slots of two members and of one, codes of all
widths. Half of an expert's 40 neurons begins within a group of codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugin.checkpoints import mix
from tests.plugin.engine import PROMPTS, generate, running
from tests.plugin.ranks import MAX_TOKENS
from tests.tiny import build_tiny
from vllm_puzzle.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    # Heads that two ranks can share.
    source = build_tiny("qwen3_moe", folder / "source", num_attention_heads=4, num_key_value_heads=2)
    assert main(["convert", str(source), str(folder / "packed"), "--compression", "25"]) == 0
    # No plain layer, since vLLM's own experts know no expert parallelism on a CPU.
    mix(source, folder / "packed", kinds=("pairs", "uneven", "even"))
    return folder / "packed"


@pytest.fixture(scope="module")
def tokens_of_one_rank(model: Path) -> list[list[int]]:
    with running(model, dtype="float32") as llm:
        return [greedy.tokens for greedy in generate(llm, PROMPTS, MAX_TOKENS)]


@pytest.mark.parametrize("options", [{}, {"enable_expert_parallel": True}], ids=["tensor", "expert"])
def test_two_ranks(options: dict[str, bool], model: Path, tokens_of_one_rank: list[list[int]], tmp_path: Path) -> None:
    arguments = {"dtype": "float32", "tensor_parallel_size": 2, "distributed_executor_backend": "mp", **options}
    result = subprocess.run(
        [sys.executable, "-m", "tests.plugin.ranks", str(model), json.dumps(arguments), str(tmp_path / "tokens")],
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "tokens").read_text()) == tokens_of_one_rank
