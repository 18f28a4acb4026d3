"""`vllm-puzzle plan` as a test calls it, and sources as it may find them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vllm_puzzle.cli import main
from vllm_puzzle.format import INDEX_FILE
from vllm_puzzle.offline.conversion.estimate import Speed
from vllm_puzzle.offline.reports.sizing import Sizing

SPEED = Speed(products=1e11, elements=1e9)


def planned(capsys: pytest.CaptureFixture[str], model: str | Path, *options: str) -> Sizing:
    capsys.readouterr()
    assert main(["plan", str(model), "--json", *options]) == 0
    return Sizing.model_validate_json(json.dumps(json.loads(capsys.readouterr().out)["result"]))


def total_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def leave_only_the_index(source: Path, **metadata: Any) -> None:
    tensors = load_file(source / "model.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (source / INDEX_FILE).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    (source / "model.safetensors").unlink()
