"""Calibration norms, held against hooks in transformers' own whole model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import FAMILIES, build_tiny
from vllm_puzzle.offline.calibration import Calibrator, ExpertNorms, read_calibration
from vllm_puzzle.offline.checkpoint import Checkpoint
from vllm_puzzle.offline.families import MoEShape, find_moe_shape

TEXT = "".join(chr(32 + (i * i + 7 * i) % 90) for i in range(1500))


def norms_of_the_whole_model(path: Path, token_ids: torch.Tensor, shape: MoEShape) -> dict[int, ExpertNorms]:
    """Every expert's inputs, gathered from the arguments that the stock experts modules are called with."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    calls: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {layer: [] for layer in shape.moe_layers}
    for layer in shape.moe_layers:
        model.model.layers[layer].mlp.experts.register_forward_pre_hook(
            lambda module, args, layer=layer: calls[layer].append((args[0], args[1]))
        )
    with torch.inference_mode():
        for row in token_ids:
            model(row[None])
    result = {}
    for layer in shape.moe_layers:
        experts = model.model.layers[layer].mlp.experts
        hidden, intermediate, counts = [], [], []
        for expert in range(shape.num_experts):
            x = torch.cat([states[(index == expert).any(dim=1)] for states, index in calls[layer]]).double()
            gate, up = (x @ experts.gate_up_proj[expert].double().T).chunk(2, dim=-1)
            hidden.append(x.norm(dim=0))
            intermediate.append((torch.nn.functional.silu(gate) * up).norm(dim=0))
            counts.append(len(x))
        result[layer] = ExpertNorms(
            torch.stack(hidden).detach(), torch.stack(intermediate).detach(), torch.tensor(counts)
        )
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    path = build_tiny(family, tmp_path / "m")
    (tmp_path / "text").write_text(TEXT)
    checkpoint = Checkpoint(path)
    config = checkpoint.config
    shape = find_moe_shape(config, "m")
    token_ids, calibration = read_calibration(tmp_path / "text", checkpoint, config, 4)
    # The model's longest sequence is shorter than the usual 2048.
    assert token_ids.shape == (4, 256)
    assert (calibration.sequences, calibration.sequence_length) == (4, 256)
    assert torch.equal(token_ids.flatten(), torch.tensor(AutoTokenizer.from_pretrained(path)(TEXT).input_ids)[:1024])
    calibrator = Calibrator(checkpoint, config, shape, token_ids)
    expected = norms_of_the_whole_model(path, token_ids, shape)
    for layer in range(shape.num_hidden_layers):
        names = [name for name in checkpoint.tensors if name.startswith(shape.layer_prefix(layer))]
        norms = calibrator.advance(layer, checkpoint.read(names))
        assert (norms is None) == (layer not in shape.moe_layers)
        if norms is None:
            continue
        # Routing may differ for a few tokens on a tie, where the two sum an expert's products in another order.
        total = int(expected[layer].tokens.sum())
        assert int(norms.tokens.sum()) == total
        assert (norms.tokens - expected[layer].tokens).abs().sum() <= 0.02 * total
        for name in ("hidden", "intermediate"):
            got, wanted = getattr(norms, name).double(), getattr(expected[layer], name)
            assert (got - wanted).norm() <= 0.03 * wanted.norm()
