"""A packed checkpoint that is not whole or not this model's is refused, and what is wrong with it is named."""

import json
from pathlib import Path

import pytest
import torch

from tests.plugin.checkpoints import a_packed_name, edit_config, edit_shard
from tests.plugin.engine import running
from tests.tiny import build_tiny
from vllm_puzzle.format import FormatError


@pytest.mark.parametrize("follow", [True, False])
def test_a_missing_tensor_is_named(copy: Path, follow: bool) -> None:
    name = a_packed_name(copy)
    edit_shard(copy, lambda tensors: tensors.pop(name), follow)
    expert = name.split(".experts.")[1]
    with pytest.raises(ValueError, match=expert), running(copy):
        pass


@pytest.mark.parametrize("new", ["99.w1.weight_packed", "{mate}.w1.weight_packed", "0.w1.weight"])
def test_an_unexpected_tensor_is_named(copy: Path, new: str) -> None:
    slots = json.loads((copy / "config.json").read_text())["quantization_config"]["layers"][1]
    name = f"model.layers.1.block_sparse_moe.experts.{new.format(mate=slots['experts'][1])}"
    edit_shard(copy, lambda tensors: tensors.update({name: torch.zeros(40, 96, dtype=torch.int16)}), follow=True)
    with pytest.raises(ValueError, match=name.split("experts.")[1]), running(copy):
        pass


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(40, 95, dtype=torch.int16), r"\[40, 95\], this model needs torch.int16 \[40, 96\]"),
        (torch.zeros(40, 96, dtype=torch.bfloat16), r"torch.bfloat16 \[40, 96\], this model needs torch.int16"),
    ],
)
def test_a_tensor_of_another_shape_or_type(copy: Path, wrong: torch.Tensor, message: str) -> None:
    name = a_packed_name(copy)
    edit_shard(copy, lambda tensors: tensors.update({name: wrong}), follow=True)
    with pytest.raises(FormatError, match=message), running(copy):
        pass


def test_a_broken_section_in_the_config(copy: Path) -> None:
    edit_config(copy, lambda config: config["quantization_config"]["layers"][0]["experts"].reverse())
    edit_config(copy, lambda config: config["quantization_config"].update(bits=8))
    with pytest.raises(ValueError, match="bits: Input should be 16"), running(copy):
        pass


def test_a_layer_that_is_not_listed(copy: Path) -> None:
    edit_config(copy, lambda config: config["quantization_config"]["layers"].pop())
    with pytest.raises(ValueError, match=r"layers\.2\..*unexpected"), running(copy):
        pass


def test_sizes_that_are_not_the_models(copy: Path) -> None:
    edit_config(copy, lambda config: config["quantization_config"].update(intermediate_size=80))
    with pytest.raises(FormatError, match="intermediate_size 40, quantization_config says 96 and 80"), running(copy):
        pass


def test_a_model_that_is_not_packed(tmp_path: Path) -> None:
    source = build_tiny("mixtral", tmp_path / "source")
    with (
        pytest.raises(ValueError, match=r"not packed.*vllm-puzzle convert MODEL PACKED"),
        running(source, quantization="puzzlemoe"),
    ):
        pass


def test_another_quantization_than_the_checkpoints(packed: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"\(puzzlemoe\) does not match .*\(fp8\)"),
        running(packed, quantization="fp8"),
    ):
        pass


def test_a_decoder_layer_without_slots(packed: Path, tmp_path: Path) -> None:
    """Where the names of tensors are not at hand, as of a model on the hub."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((packed / name).read_text())
    edit_config(tmp_path, lambda config: config["quantization_config"]["layers"].pop())
    message = r"layers\.2\..*lists layers \[0, 1\] only"
    with pytest.raises(FormatError, match=message), running(tmp_path, load_format="dummy"):
        pass


def test_a_weight_that_float16_cannot_hold_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = a_packed_name(copy)
    # Member 0 alone, exponent 31: 2**15.
    edit_shard(copy, lambda tensors: tensors[name][3].fill_(1 << 13 | 31 << 7), follow=True)
    monkeypatch.setenv("VLLM_PUZZLE_ENGINE", "triton")
    expert = name.split(".experts.")[1].split(".")[0]
    message = rf"layers\.1\..*w13_weight_packed has .* 32768 or more in the slot of expert {expert}, which float16"
    with pytest.raises(FormatError, match=message), running(copy, dtype="float16"):
        pass


def test_a_codebook_without_zero_is_refused(mixed_copy: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight_codebook"
    edit_shard(mixed_copy, lambda tensors: tensors[name].add_(1), follow=True)
    message = r"experts\.5\.w2\.weight_codebook has no point \(0, 0\), which every codebook needs"
    with pytest.raises(FormatError, match=message), running(mixed_copy):
        pass
