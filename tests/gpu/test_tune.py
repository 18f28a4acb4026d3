"""`vllm-puzzle tune` on a card: it compiles, measures, saves, and the engine then takes what was saved."""

from pathlib import Path

import pytest
import torch

from vllm_puzzle.cli import main
from vllm_puzzle.kernels.triton.configs import CallSizes, file_name, find_config, load_configs
from vllm_puzzle.kernels.triton.target import current_target

pytestmark = pytest.mark.gpu

SIZES = {"num_experts": 16, "top_k": 4, "hidden_size": 1024, "intermediate_size": 768}


def test_what_is_tuned_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    sizes = [word for name, size in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(size))]
    assert main(["tune", *sizes, "--tokens", "1", "64", "--seconds", "60"]) == 0
    target = current_target(torch.device("cuda"))
    tuned = load_configs(tmp_path / file_name(16, 768, target.device_name))
    assert list(tuned) == [1, 64]
    assert find_config(target, CallSizes(16, 8, 1024, 768, 4, num_tokens=60)) == tuned[64]
