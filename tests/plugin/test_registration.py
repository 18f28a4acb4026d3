"""Registering with vLLM: of the right version, once, and for nothing until then."""

import logging
import subprocess
import sys

import pytest

from vllm_puzzle.plugin import register
from vllm_puzzle.plugin.versions import UnsupportedVLLMError, check_vllm


def test_registering_twice_changes_nothing() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    register()
    register()
    assert QUANTIZATION_METHODS.count("puzzlemoe") == 1
    assert get_quantization_config("puzzlemoe").__name__ == "PuzzleMoEConfig"


def test_an_unsupported_vllm_is_told_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.31.2")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.ERROR):
        register()
    assert "found 0.31.2; install 'vllm-puzzle[cuda]'" in caplog.text
    with pytest.raises(UnsupportedVLLMError):
        check_vllm()


def run(program: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_a_missing_vllm_says_what_to_install() -> None:
    blocked = "import sys; sys.modules['vllm'] = None\n"
    result = run(blocked + "from vllm_puzzle.plugin import register; register()")
    assert "vllm-puzzle serves through vLLM" in result.stderr
    assert "'vllm-puzzle[cpu]' for machines without a GPU" in result.stderr


def test_importing_the_package_is_free() -> None:
    heavy = (
        "import sys, vllm_puzzle; print([m for m in ('vllm', 'triton', 'torch', 'transformers') if m in sys.modules])"
    )
    assert run(heavy).stdout == "[]\n"
    offline = "import sys, vllm_puzzle.offline.conversion.convert; print('vllm' in sys.modules)"
    assert run(offline).stdout == "False\n"
