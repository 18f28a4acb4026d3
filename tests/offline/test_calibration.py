"""Calibration, compared with hooks in transformers' own whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.activations import ACT2FN

from tests.offline.whole_model import WholeModel, moe_block, run_whole_model
from tests.tiny import FAMILIES, UNDECLARED, build_tiny
from vllm_puzzle.cli import main
from vllm_puzzle.offline.checkpoints.dense import build_model
from vllm_puzzle.offline.checkpoints.expert_tensors import layer_experts
from vllm_puzzle.offline.checkpoints.source import SourceCheckpoint
from vllm_puzzle.offline.conversion.calibration import Calibrator, HiddenStates
from vllm_puzzle.offline.conversion.calibration_text import read_calibration_text
from vllm_puzzle.offline.conversion.calibration_walk import CalibrationWalk
from vllm_puzzle.offline.merging.layer import ExpertWeights, LayerTokens
from vllm_puzzle.offline.merging.saliency import input_norms

TEXT = "".join(chr(32 + (i * i + 7 * i) % 90) for i in range(1500))


def sums_of_the_whole_model(whole: WholeModel, layer: int) -> list[torch.Tensor]:
    """Of every expert: how many tokens it had, the norms of its inputs, and its squared router weights."""
    states, index, weights = whole.entering[layer]
    weights = weights * getattr(whole.layers[layer], "residual_multiplier", 1)
    every_gate_up = moe_block(whole.layers[layer]).experts.gate_up_proj
    if every_gate_up.shape[1] == states.shape[1]:
        every_gate_up = every_gate_up.mT
    sums = []
    for expert, gate_up in enumerate(every_gate_up):
        x = states[(index == expert).any(dim=1)].double()
        gate, up = (x @ gate_up.double().T).chunk(2, dim=-1)
        intermediate = torch.nn.functional.silu(gate) * up
        chosen = weights[index == expert].double()
        sums.append((torch.tensor(float(len(x))), x.norm(dim=0), intermediate.norm(dim=0), chosen.square().sum()))
    return [torch.stack(each) for each in zip(*sums, strict=True)]


# What stands in the way of the others.
NOT_CALIBRATED = {
    "afmoe": "does not add its experts' output to everything else as it is",
    "flex_olmo": "does not add its experts' output to everything else as it is",
    "gemma4_text": "embeds tokens by Gemma4TextScaledWordEmbedding",
    "glm_moe_dsa": "does not run",
    "kimi_linear": "layer 0 does not fit transformers' own model",
}
# It repeats glm4_moe_lite, with an attention that is slow on a CPU.
CALIBRATED = [*FAMILIES, *(family for family in UNDECLARED if family not in {*NOT_CALIBRATED, "deepseek_v32"})]

# Layers 0 and 2 see a window, layer 1 sees everything.
WINDOWS = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}


@pytest.mark.heavy
@pytest.mark.parametrize(("family", "overrides"), [*((family, {}) for family in CALIBRATED), ("qwen2_moe", WINDOWS)])
@torch.inference_mode()
def test_norms_are_those_of_the_whole_model(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    path = build_tiny(family, tmp_path / "m", **overrides)
    (tmp_path / "text").write_text(TEXT)
    checkpoint = SourceCheckpoint(path)
    config, shape = checkpoint.config, checkpoint.shape
    text = read_calibration_text(tmp_path / "text", checkpoint, config, 4)
    token_ids = text.token_ids
    # The model's longest sequence is shorter than the usual 2048.
    assert token_ids.shape == (4, 256)
    assert (text.record.sequences, text.record.sequence_length) == (4, 256)
    assert torch.equal(token_ids.flatten(), torch.tensor(AutoTokenizer.from_pretrained(path)(TEXT).input_ids)[:1024])
    calibrator = Calibrator(checkpoint, build_model(config, "config.json"), token_ids, torch.device("cpu"))
    hidden = calibrator.embed()
    whole = run_whole_model(path, token_ids, shape)
    for layer in range(shape.num_hidden_layers):
        seen = calibrator.run(layer, hidden)
        assert (seen is None) == (layer not in shape.moe_layers)
        if seen is not None:
            names = [name for name in checkpoint.tensors if name.startswith(shape.experts_prefix(layer))]
            tensors = checkpoint.read(names)
            experts = layer_experts(shape, layer, tensors, ACT2FN[shape.hidden_act], torch.device("cpu"))
            sums = []
            for expert in range(shape.num_experts):
                tokens, weights = seen.of(expert)
                norms = input_norms(experts, expert, seen)
                sums.append((torch.tensor(float(len(tokens))), *norms, weights.square().sum()))
            got = [torch.stack(each).double() for each in zip(*sums, strict=True)]
            wanted = sums_of_the_whole_model(whole, layer)
            # Routing may differ for a few tokens on a tie, where the two sum an expert's products in another order.
            assert got[0].sum() == wanted[0].sum() == seen.topk_ids.numel()
            assert (got[0] - wanted[0]).abs().sum() <= 0.02 * wanted[0].sum()
            for mine, whole_model in zip(got[1:], wanted[1:], strict=True):
                assert (mine - whole_model).norm() <= 0.03 * whole_model.norm()
            hidden.add(seen.through(experts))
        leaving = whole.leaving[layer].float()
        # Of most tokens, for the same reason.
        assert (hidden.tokens - leaving).norm(dim=1).median() <= 0.02 * leaving.norm(dim=1).median()


@pytest.mark.heavy
@pytest.mark.parametrize("family", NOT_CALIBRATED)
def test_what_cannot_be_calibrated_says_so(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = build_tiny(family, tmp_path / "source")
    (tmp_path / "text").write_text(TEXT)
    options = ["--calibration", str(tmp_path / "text"), "--calibration-sequences", "1", "--rule", "paper"]
    capsys.readouterr()
    assert main(["convert", str(source), str(tmp_path / "packed"), *options]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert NOT_CALIBRATED[family] in message
    assert "convert without --calibration" in message


def test_what_experts_answer_is_added_in_float32() -> None:
    hidden = HiddenStates(torch.full((2, 3, 4), 258.0, dtype=torch.bfloat16))
    copy = hidden.copy()
    # Rounded to bfloat16 before the sum, 0.999 would be 1, and 259 would go to the even neighbour, 260.
    hidden.add(torch.full((6, 4), 0.999))
    assert bool((hidden.states == 258).all())
    hidden.add(torch.arange(24.0).reshape(6, 4) * 2)
    assert torch.equal(hidden.tokens.flatten().float(), 258 + torch.arange(24.0) * 2)
    assert bool((copy.states == 258).all())


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "granitemoe"])
def test_each_layer_makes_up_for_the_merged_layers_before_it(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What enters a layer's experts while it is merged is what enters them in the model that comes out."""
    path, packed, plain = build_tiny(family, tmp_path / "m"), tmp_path / "packed", tmp_path / "plain"
    (tmp_path / "text").write_text(TEXT)
    seen: list[LayerTokens] = []
    leave = CalibrationWalk.leave

    def record(walk: CalibrationWalk, layer: int, tokens: LayerTokens, experts: ExpertWeights) -> None:
        seen.append(tokens)
        leave(walk, layer, tokens, experts)

    monkeypatch.setattr(CalibrationWalk, "leave", record)
    options = ["--calibration", str(tmp_path / "text"), "--calibration-sequences", "2", "--rule", "compensated"]
    assert main(["convert", str(path), str(packed), *options]) == 0
    assert main(["unpack", str(packed), str(plain)]) == 0
    checkpoint = SourceCheckpoint(path)
    shape = checkpoint.shape
    text = read_calibration_text(tmp_path / "text", checkpoint, checkpoint.config, 2)
    source, merged = (run_whole_model(model, text.token_ids, shape) for model in (path, plain))
    for layer, tokens in zip(shape.moe_layers, seen, strict=True):
        assert tokens.lacking is not None
        before, after = (whole.entering[layer][0].float() for whole in (source, merged))
        # Of most tokens: on a tie the two may route a token elsewhere.
        away, drift = ((tokens.routed.hidden - each).norm(dim=1).median() for each in (after, before))
        assert away < 0.02 * after.norm(dim=1).median()
        if layer > shape.moe_layers[0]:
            # Far enough from the source for this to tell anything.
            assert away < 0.5 * drift
        # And what it still lacks then is known, but for what both models round.
        left = source.leaving[layer].float() - merged.leaving[layer].float()
        assert (tokens.lacking - left).norm(dim=1).median() < 0.6 * left.norm(dim=1).median()
