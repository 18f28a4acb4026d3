"""Checkpoints of models that see: their text model's experts are packed, and all else stays as it is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM

from tests.offline.checkpoints import read_stored
from tests.tiny import MULTIMODAL, build_tiny_multimodal, by_expert
from vllm_puzzle.cli import main
from vllm_puzzle.format import parse_expert_name

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize("family", MULTIMODAL)
def test_all_but_the_experts_stays_bit_for_bit(family: str, text: Path, tmp_path: Path) -> None:
    source, packed, plain = build_tiny_multimodal(family, tmp_path / "source"), tmp_path / "packed", tmp_path / "plain"
    options = ["--rule", "paper", "--calibration", str(text), "--calibration-sequences", "1"]
    for arguments in (
        ["convert", source, packed, *options],
        ["verify", source, packed],
        ["inspect", packed],
        ["unpack", packed, plain],
        ["plan", source],
    ):
        assert main([str(each) for each in arguments]) == 0
    before, between, after = load_file(source / "model.safetensors"), read_stored(packed), read_stored(plain)
    assert before.keys() == after.keys()
    dense = [name for name in by_expert(before) if ".experts." not in name]
    assert any("vis" in name for name in dense)
    for name in dense:
        assert torch.equal(before[name], between[name])
        assert torch.equal(before[name], after[name])
    experts = {name.rsplit(".", 3)[0] for name in by_expert(before) if ".experts." in name}
    assert {name.rsplit(".", 3)[0] for name in between if parse_expert_name(name)} == experts
    for name in ("preprocessor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (source / name).read_bytes() == (packed / name).read_bytes() == (plain / name).read_bytes()


def test_experts_of_qwen3_vl_in_either_orientation(tmp_path: Path) -> None:
    """The hub has inputs before outputs; transformers writes outputs before inputs under the same names."""
    from safetensors.torch import save_file

    packed = []
    for name in ("own", "hub"):
        source = build_tiny_multimodal("qwen3_vl_moe", tmp_path / name)
        if name == "hub":
            tensors = load_file(source / "model.safetensors")
            turned = {key: tensor.mT.contiguous() if ".experts." in key else tensor for key, tensor in tensors.items()}
            save_file(turned, source / "model.safetensors", {"format": "pt"})
        assert main(["convert", str(source), str(tmp_path / f"{name}-packed"), "--rule", "paper"]) == 0
        assert main(["unpack", str(tmp_path / f"{name}-packed"), str(tmp_path / f"{name}-plain")]) == 0
        packed.append(read_stored(tmp_path / f"{name}-packed"))
    assert packed[0].keys() == packed[1].keys()
    assert all(torch.equal(tensor, packed[1][key]) for key, tensor in packed[0].items())


def test_calibration_goes_through_the_text_model_inside(text: Path, tmp_path: Path) -> None:
    """What its experts are given is what they are given in the whole model."""
    from transformers import AutoTokenizer

    from vllm_puzzle.offline.checkpoints.dense import build_model
    from vllm_puzzle.offline.checkpoints.source import SourceCheckpoint
    from vllm_puzzle.offline.conversion.calibration import Calibrator

    source = build_tiny_multimodal("qwen3_vl_moe", tmp_path / "source")
    ids = AutoTokenizer.from_pretrained(source)(text.read_text(), return_tensors="pt").input_ids[:, :64]
    checkpoint = SourceCheckpoint(source)
    calibrator = Calibrator(checkpoint, build_model(checkpoint.config, "config.json"), ids, torch.device("cpu"))
    seen = calibrator.run(0, calibrator.embed())
    assert seen is not None
    model = AutoModelForMultimodalLM.from_pretrained(source, dtype=torch.float32).eval()
    calls: list[tuple[torch.Tensor, ...]] = []
    experts = model.model.language_model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
    with torch.inference_mode():
        model(ids)
    hidden, chosen, weights = calls[0]
    assert (seen.hidden.float() - hidden).norm() <= 0.02 * hidden.norm()
    assert torch.equal(seen.topk_ids, chosen)
    assert (seen.topk_weights - weights).abs().max() <= 0.02
