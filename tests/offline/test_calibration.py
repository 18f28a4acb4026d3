"""Calibration, held against hooks in transformers' own whole model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.activations import ACT2FN

import vllm_puzzle.offline.conversion.units
from tests.tiny import FAMILIES, build_tiny
from vllm_puzzle.cli import main
from vllm_puzzle.offline.checkpoints.expert_tensors import layer_experts
from vllm_puzzle.offline.checkpoints.families import MoEShape
from vllm_puzzle.offline.checkpoints.source import SourceCheckpoint
from vllm_puzzle.offline.conversion.calibration import Calibrator, HiddenStates, read_calibration
from vllm_puzzle.offline.merging.layer import RoutedTokens
from vllm_puzzle.offline.merging.merge_layer import MergedLayer
from vllm_puzzle.offline.merging.saliency import input_norms

TEXT = "".join(chr(32 + (i * i + 7 * i) % 90) for i in range(1500))


@dataclass
class WholeModel:
    """What transformers' own model did with some tokens: per layer, all sequences one after the other.

    `entering` is what the stock experts modules were given (hidden, ids, router weights), `leaving` the states
    after each decoder layer. The model's weights are `layers`.
    """

    layers: Any
    entering: dict[int, Sequence[torch.Tensor]]
    leaving: list[torch.Tensor]


def moe_block(layer: Any) -> Any:
    """What transformers calls mlp in most families."""
    return next(getattr(layer, name) for name in ("mlp", "block_sparse_moe", "feed_forward") if hasattr(layer, name))


def routed(experts: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """(hidden, ids, router weights) of a call of an experts module.

    Llama 4 gives every expert all tokens, times the router weight of the one that is chosen and zero for the others.
    """
    if len(arguments) == 3:
        return arguments
    weighed = arguments[0].view(experts.num_experts, -1, experts.hidden_size)
    chosen = [[int(expert.any(dim=1).nonzero()[0])] for expert in weighed.unbind(dim=1)]
    return weighed.sum(dim=0), torch.tensor(chosen), torch.ones(len(chosen), 1)


def run_whole_model(path: Path, token_ids: torch.Tensor, shape: MoEShape) -> WholeModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    calls: dict[int, list[tuple[torch.Tensor, ...]]] = {layer: [] for layer in shape.moe_layers}
    leaving: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for layer in shape.moe_layers:
        moe_block(model.model.layers[layer]).experts.register_forward_pre_hook(
            lambda module, args, layer=layer: calls[layer].append(routed(module, args))
        )
    for layer, module in enumerate(model.model.layers):
        module.register_forward_hook(lambda module, args, output, layer=layer: leaving[layer].append(output[0]))
    with torch.inference_mode():
        for row in token_ids:
            model(row[None])
    return WholeModel(
        model.model.layers,
        {layer: [torch.cat(part) for part in zip(*parts, strict=True)] for layer, parts in calls.items()},
        [torch.cat(states) for states in leaving],
    )


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


# Layers 0 and 2 see a window, layer 1 sees everything.
WINDOWS = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}


@pytest.mark.heavy
@pytest.mark.parametrize(("family", "overrides"), [*((family, {}) for family in FAMILIES), ("qwen2_moe", WINDOWS)])
@torch.inference_mode()
def test_norms_are_those_of_the_whole_model(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    path = build_tiny(family, tmp_path / "m", **overrides)
    (tmp_path / "text").write_text(TEXT)
    checkpoint = SourceCheckpoint(path)
    config, shape = checkpoint.config, checkpoint.shape
    token_ids, calibration = read_calibration(tmp_path / "text", checkpoint, config, 4)
    # The model's longest sequence is shorter than the usual 2048.
    assert token_ids.shape == (4, 256)
    assert (calibration.sequences, calibration.sequence_length) == (4, 256)
    assert torch.equal(token_ids.flatten(), torch.tensor(AutoTokenizer.from_pretrained(path)(TEXT).input_ids)[:1024])
    calibrator = Calibrator(checkpoint, config, shape, torch.device("cpu"))
    hidden = calibrator.embed(token_ids)
    whole = run_whole_model(path, token_ids, shape)
    for layer in range(shape.num_hidden_layers):
        tensors = checkpoint.read([name for name in checkpoint.tensors if name.startswith(shape.layer_prefix(layer))])
        calibrator.load(layer, tensors)
        seen = calibrator.run(hidden)
        assert (seen is None) == (layer not in shape.moe_layers)
        if seen is not None:
            experts = layer_experts(shape, layer, tensors, ACT2FN[config.hidden_act], torch.device("cpu"))
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
    calls: list[tuple[RoutedTokens, torch.Tensor]] = []
    merge_layer = vllm_puzzle.offline.conversion.units.merge_layer

    def record(*arguments: Any) -> MergedLayer:
        result = merge_layer(*arguments)
        calls.append(arguments[6:8])
        return result

    monkeypatch.setattr("vllm_puzzle.offline.conversion.units.merge_layer", record)
    options = ["--calibration", str(tmp_path / "text"), "--calibration-sequences", "2", "--rule", "compensated"]
    assert main(["convert", str(path), str(packed), *options]) == 0
    assert main(["unpack", str(packed), str(plain)]) == 0
    checkpoint = SourceCheckpoint(path)
    shape = checkpoint.shape
    token_ids, _ = read_calibration(tmp_path / "text", checkpoint, checkpoint.config, 2)
    source, merged = (run_whole_model(model, token_ids, shape) for model in (path, plain))
    assert len(calls) == len(shape.moe_layers)
    for layer, (arrived, lacking) in zip(shape.moe_layers, calls, strict=True):
        before, after = (whole.entering[layer][0].float() for whole in (source, merged))
        # Of most tokens: on a tie the two may route a token elsewhere.
        away, drift = ((arrived.hidden - each).norm(dim=1).median() for each in (after, before))
        assert away < 0.02 * after.norm(dim=1).median()
        if layer > shape.moe_layers[0]:
            # Far enough from the source for this to tell anything.
            assert away < 0.5 * drift
        # And what it still lacks then is known, but for what both models round.
        left = source.leaving[layer].float() - merged.leaving[layer].float()
        assert (lacking - left).norm(dim=1).median() < 0.6 * left.norm(dim=1).median()
