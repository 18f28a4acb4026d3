"""Models that are declared nowhere, multimodal ones among them, through the converter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models.facts import recorded
from tests.models.statuses import STATUSES
from tests.models.tiny_configs import MULTIMODAL, TEXT
from tests.models.tiny_models import architecture, build
from tests.offline.checkpoints import read_stored
from tests.tiny import by_expert
from vllm_puzzle.cli import main

# Those of the two dictionaries that tests/offline/test_undeclared.py does not convert.
CONVERTED = (
    "axk1",
    "glm4v_moe",
    "granitemoeshared",
    "kimi_k25",
    "llama4",
    "mistral3",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_omni_moe",
    "qwen3_vl_moe",
)

# vLLM has no class of its own for them and takes the one of transformers.
WITHOUT_CLASS = ("Dots1ForCausalLM", "Mistral4ForCausalLM", "SolarOpenForCausalLM")


@pytest.mark.heavy
@pytest.mark.parametrize("model_type", CONVERTED)
def test_conversion_packs_experts_and_leaves_the_rest(model_type: str, tmp_path: Path) -> None:
    source, packed, plain = build(model_type, tmp_path / "source"), tmp_path / "packed", tmp_path / "plain"
    assert main(["convert", str(source), str(packed), "--rule", "paper"]) == 0
    assert main(["verify", str(source), str(packed)]) == 0
    assert main(["unpack", str(packed), str(plain)]) == 0
    before, between, after = load_file(source / "model.safetensors"), read_stored(packed), read_stored(plain)
    # What by_expert splits is of experts too, whatever it is called.
    rest = {name for name in before.keys() & by_expert(before).keys() if ".experts." not in name}
    assert rest
    for name in rest:
        assert torch.equal(before[name], between[name])
        assert torch.equal(before[name], after[name])
    assert any(name.endswith(".weight_packed") for name in between)
    assert not any(name.endswith(".weight_packed") for name in after)


@pytest.mark.parametrize("model_type", [*TEXT, *MULTIMODAL])
def test_tiny_models_are_of_classes_that_we_speak_of(model_type: str) -> None:
    name = architecture(model_type)
    assert name in recorded() or name in WITHOUT_CLASS
    if model_type in CONVERTED:
        assert STATUSES[name] == replace(STATUSES[name], word="converts", model=model_type)
