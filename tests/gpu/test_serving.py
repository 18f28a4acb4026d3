"""The compiled kernels in vLLM: a model's tokens, and a server. They need vLLM and openai."""

from pathlib import Path

import pytest
from openai import OpenAI

from benchmarks.demo.server import serving
from tests.plugin.engine import PROMPTS, assert_same_tokens, generate, running
from tests.tiny import build_tiny
from vllm_puzzle.cli import main
from vllm_puzzle.kernels import REFERENCE, TRITON

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def packed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    source, packed = build_tiny("qwen3_moe", folder / "source"), folder / "packed"
    assert main(["convert", str(source), str(packed)]) == 0
    return packed


def test_a_model_gives_the_tokens_of_the_reference_engine(packed_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled and captured in graphs, against eager mode with the reference engine."""
    results = []
    for engine, eager in ((REFERENCE, True), (TRITON, False)):
        monkeypatch.setenv("VLLM_PUZZLE_ENGINE", engine)
        with running(packed_model, enforce_eager=eager, gpu_memory_utilization=0.3) as llm:
            results.append(generate(llm, PROMPTS, 32))
    assert_same_tokens(*results)


def test_a_server_takes_the_triton_engine_by_itself(packed_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    options = ("--quantization", "puzzlemoe", "--no-enforce-eager", "--gpu-memory-utilization", "0.3")
    with serving(packed_model, log, *options) as server:
        client = OpenAI(base_url=server.base_url, api_key="none")
        answers = [
            client.completions.create(model=str(packed_model), prompt="three pears", temperature=0, max_tokens=16)
            for _ in range(2)
        ]
    assert answers[0].choices[0].text == answers[1].choices[0].text
    assert "Routed experts run from packed pairs on the engine triton" in log.read_text()
