"""Twins of a checkpoint: that the function stays where weights change, and that use becomes as uneven as it should."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.reference_model.twins import SKEW, rotated, skew_routers
from tests.tiny import build_tiny

TOKENS = torch.randint(0, 256, (4, 200), generator=torch.Generator().manual_seed(1))


def with_uneven_norms(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint in float32, whose norms' weights were all 1."""
    generator = torch.Generator().manual_seed(2)
    tensors = {name: tensor.float() for name, tensor in load_file(path / "model.safetensors").items()}
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor.mul_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return tensors


def model_of(path: Path, tensors: dict[str, torch.Tensor], copy: Path) -> AutoModelForCausalLM:
    """transformers' own model of the checkpoint's configuration, in float32, with other tensors."""
    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(copy)
    # Through a file, as transformers turns names on disk into its own there.
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_rotated_twin_computes_the_same(family: str, tmp_path: Path) -> None:
    path = build_tiny(family, tmp_path / "tiny")
    tensors = with_uneven_norms(path)
    twin = rotated(tensors)
    assert twin.keys() == tensors.keys()
    assert all(twin[name].shape == tensor.shape for name, tensor in tensors.items())
    with torch.inference_mode():
        expected = model_of(path, tensors, tmp_path / "source")(TOKENS).logits
        got = model_of(path, twin, tmp_path / "twin")(TOKENS).logits
    assert expected.std() > 0.1
    assert (got - expected).abs().max() < 1e-3 * expected.abs().max()
    # It is another model all the same: every matrix that meets the residual stream has changed.
    changed = [name for name, tensor in tensors.items() if not torch.allclose(twin[name], tensor, rtol=0.1, atol=1e-3)]
    assert changed == [name for name, tensor in tensors.items() if tensor.ndim == 2 or name.endswith("norm.weight")]


def test_a_tied_head_becomes_a_tensor_of_its_own(tmp_path: Path) -> None:
    path = build_tiny("mixtral", tmp_path / "tiny")
    tensors = with_uneven_norms(path)
    tied = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    twin = rotated(tied)
    untied = rotated({**tied, "lm_head.weight": tied["model.embed_tokens.weight"]})
    assert torch.equal(twin["lm_head.weight"], untied["lm_head.weight"])
    assert not torch.allclose(twin["lm_head.weight"], twin["model.embed_tokens.weight"], atol=1e-2)


def test_a_skewed_twin_uses_its_experts_log_normally(tmp_path: Path) -> None:
    path = build_tiny("mixtral", tmp_path / "tiny")
    tensors = with_uneven_norms(path)
    # Tokens of a real model have a direction in common.
    tensors["model.embed_tokens.weight"] += 0.3 * torch.randn(96, generator=torch.Generator().manual_seed(3))
    model = model_of(path, tensors, tmp_path / "source")
    skew_routers(model, TOKENS)
    usage: list[torch.Tensor] = []

    def count(_router: object, _arguments: object, output: tuple[torch.Tensor, ...]) -> None:
        usage.append(torch.bincount(output[2].flatten(), minlength=8) / TOKENS.numel())

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(count)
    with torch.inference_mode():
        model(TOKENS)
    for shares in usage:
        assert float(shares.log().std()) == pytest.approx(SKEW, rel=0.25)
    # Not the same experts everywhere.
    assert len({int(shares.argmax()) for shares in usage}) > 1
