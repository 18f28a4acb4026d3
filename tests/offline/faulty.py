"""Spoiling checkpoints, and what a refusal has to look like."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_puzzle.cli import main

# One matrix of the tiny Mixtral.
EXPERT = "model.layers.1.block_sparse_moe.experts.5.w3.weight"

# What is said before the work starts.
ANNOUNCEMENTS = ("no calibration text was given", "rule ", "pairing ")


def snapshot(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def assert_refused(arguments: list[str], root: Path, capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """The command fails with one sentence that has all of `parts`, and nothing under `root` has changed."""
    before = snapshot(root)
    capsys.readouterr()
    assert main(arguments) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    # What was announced on the way comes before it.
    message = lines[-1]
    assert message.startswith("error: ")
    assert all(line.startswith(ANNOUNCEMENTS) for line in lines[:-1])
    for part in parts:
        assert part in message, message
    assert snapshot(root) == before


def assert_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], *parts: str) -> None:
    """The command fails, prints nothing, and says one sentence that has all of `parts`."""
    capsys.readouterr()
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    for part in parts:
        assert part in captured.err


def edit_config(source: Path, **changes: object) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(source: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
