"""Families that nobody declared: what they have is found in names, shapes and config."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.offline.checkpoints import read_stored
from tests.offline.faulty import assert_one_sentence, edit_config, edit_tensors
from tests.offline.planning import leave_only_the_index, planned
from tests.tiny import UNDECLARED, build_tiny, by_expert
from vllm_puzzle.cli import main
from vllm_puzzle.format import parse_expert_name
from vllm_puzzle.offline.checkpoints.layout import Layout, find_layout

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize(
    ("family", "options"),
    [*((family, ("--rule", "paper")) for family in UNDECLARED), ("lfm2_moe", ("--bits", "3"))],
)
def test_a_family_with_usual_names_needs_no_code(
    family: str, options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, packed, plain = build_tiny(family, tmp_path / "source"), tmp_path / "packed", tmp_path / "plain"
    capsys.readouterr()
    assert main(["convert", str(source), str(packed), *options]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "is not declared" in line]
    assert len(said) == 1
    assert "8 experts of 3 x 40 x 96" in said[0]
    for arguments in (["verify", source, packed], ["inspect", packed], ["unpack", packed, plain]):
        assert main([str(each) for each in arguments]) == 0
    before, between, after = load_file(source / "model.safetensors"), read_stored(packed), read_stored(plain)
    matrices = by_expert(before)
    assert after.keys() == matrices.keys()
    experts = {name for name in matrices if ".experts.0." in name}
    assert experts
    assert {name.rsplit(".", 3)[0] for name in between if parse_expert_name(name)} == {
        name.rsplit(".", 3)[0] for name in experts
    }
    for name in before.keys() & matrices.keys():
        if ".experts." not in name or "bias" in name:
            assert torch.equal(before[name], between[name])
            assert torch.equal(before[name], after[name])


def test_what_an_index_alone_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = build_tiny("exaone_moe", tmp_path / "source")
    from_headers = planned(capsys, source)
    leave_only_the_index(source, total_size=from_headers.total_bytes_before)
    from_index = planned(capsys, source)
    assert (from_headers.read_from, from_index.read_from) == ("headers", "index")
    assert from_index.expert_bytes_before == from_headers.expert_bytes_before
    assert (from_index.top_k, from_index.moe_layers) == (2, 2)
    source = build_tiny("hunyuan_v1_moe", tmp_path / "other")
    leave_only_the_index(source, total_size=1 << 20)
    assert_one_sentence(capsys, ["plan", str(source)], "does not say how large the experts are", "beside it")


def test_experts_in_an_index_that_are_three_dimensional(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = build_tiny("gemma4_text", tmp_path / "source")
    leave_only_the_index(source, total_size=1 << 20)
    assert_one_sentence(capsys, ["plan", str(source)], "three-dimensional tensors", "put them beside the index")


@pytest.mark.parametrize("layers", ["layers.", "model.layers.", "thinker.model.layers.", "backbone.model.layers."])
@pytest.mark.parametrize("block", ["", "mlp", "block_sparse_moe.inner"])
def test_experts_are_found_whatever_stands_around_them(layers: str, block: str) -> None:
    shapes = {"w1": (40, 96), "w3": (40, 96), "w2": (96, 40)}
    place = f"{block}.experts" if block else "experts"
    own = {
        f"{layers}{layer}.{place}.{expert}.{name}.weight": shape
        for layer in (1, 3)
        for expert in range(4)
        for name, shape in shapes.items()
    }
    others = [
        "talker.model.layers.0.mlp.experts.0.gate_proj.weight",
        "mtp.layers.0.mlp.experts.0.gate_proj.weight",
        # After the decoder.
        f"{layers}5.mlp.experts.0.gate_proj.weight",
        "visual.blocks.0.mlp.experts.0.gate_proj.weight",
        f"{layers}1.mlp.shared_experts.gate_proj.weight",
    ]
    found = find_layout({**own, **dict.fromkeys(others, (2, 2))}, 5, "m")
    assert found == Layout(layers, block, ("w1", "w3", "w2"), (1, 3), 4, (96, 40))


Tensors = dict[str, torch.Tensor]
EXPERT = "model.layers.1.mlp.experts.0."


def rename(tensors: Tensors, old: str, new: str) -> None:
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new)] = tensors.pop(name)


def drop(tensors: Tensors, part: str) -> None:
    for name in [name for name in tensors if part in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("spoil", "changes", "parts"),
    [
        (lambda tensors: None, {"architectures": ["UnheardOfForCausalLM"]}, ("no Mixture of Experts that vLLM 0.32",)),
        (
            lambda tensors: tensors.update({f"{EXPERT}up_proj.bias": torch.zeros(40)}),
            {},
            ("have biases", f"{EXPERT}up_proj.bias"),
        ),
        (lambda tensors: rename(tensors, "experts.", "specialists."), {}, ("no experts are found",)),
        (
            lambda tensors: rename(tensors, "layers.2.mlp.experts.", "layers.2.moe.experts."),
            {},
            ("more than one kind", "model.layers.*.mlp.experts, model.layers.*.moe.experts"),
        ),
        (lambda tensors: drop(tensors, "gate_proj"), {}, ("have down_proj, up_proj where gate_proj, up_proj",)),
        (lambda tensors: drop(tensors, "layers.2.mlp.experts.7."), {}, ("not as many in every layer: [7, 8]",)),
        (lambda tensors: drop(tensors, f"{EXPERT}up"), {}, (f"{EXPERT}up_proj.weight is missing",)),
        (lambda tensors: None, {"num_experts": 9}, ("experts.8.gate_proj.weight is missing",)),
        (lambda tensors: None, {"moe_intermediate_size": 48}, ("has shape [40, 96]", "implies [48, 96]")),
        (lambda tensors: None, {"hidden_size": 192}, ("hidden_size 192", "take 96 inputs", "latent")),
        (lambda tensors: None, {"swiglu_limits": [0.0, 7.0, 7.0]}, ("swiglu_limits", "cannot be packed")),
        (lambda tensors: None, {"moe_apply_router_weight_on_input": True}, ("router weights go into its experts",)),
    ],
)
def test_what_is_not_as_usual_is_refused(
    spoil: Callable[[Tensors], Any],
    changes: dict[str, Any],
    parts: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = build_tiny("exaone_moe", tmp_path / "source")
    edit_tensors(source, spoil)
    edit_config(source, **changes)
    assert main(["convert", str(source), str(tmp_path / "packed"), "--rule", "paper"]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    for part in parts:
        assert part in message, message


def test_an_architecture_that_transformers_lacks(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It converts without a text, and is refused with one."""
    source, packed = build_tiny("hunyuan_v1_moe", tmp_path / "source"), tmp_path / "packed"
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["SarvamMoEForCausalLM"], "model_type": "sarvam_moe", "num_experts_per_tok": 2}
    (source / "config.json").write_text(json.dumps(config))
    arguments = ["convert", str(source), str(packed), "--rule", "paper"]
    assert main([*arguments, "--calibration", str(text)]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "transformers has no model of SarvamMoEForCausalLM" in message
    assert "without --calibration" in message
    assert main(arguments) == 0
    for command in (["verify", source, packed], ["inspect", packed], ["unpack", packed, tmp_path / "plain"]):
        assert main([str(each) for each in command]) == 0
