"""Conversion to codes: sizes, what stays untouched, what is told, and the way back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.offline.checkpoints import expert_bytes, read_all
from tests.offline.coded import convert, decode_all, make_mixed, quantization_of
from tests.offline.faulty import edit_tensors
from tests.tiny import FAMILIES, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, add_mtp_layer, build_tiny, short_text
from vllm_puzzle.cli import main
from vllm_puzzle.format import CodedShape

CALIBRATION = ["--calibration", "TEXT", "--calibration-sequences", "2"]
QUICK = ("qwen2_moe", "granitemoe")
REST = sorted(FAMILIES.keys() - set(QUICK))


def with_text(options: list[str], folder: Path) -> list[str]:
    (folder / "text").write_text(short_text(60))
    return [str(folder / "text") if option == "TEXT" else option for option in options]


def coded_bytes(bits: int, hidden_size: int = HIDDEN_SIZE) -> int:
    """Of one expert."""
    kinds = (CodedShape.of_w13, CodedShape.of_w2)
    # The last row of an odd number has a scale for itself alone.
    return sum(kind(hidden_size, INTERMEDIATE_SIZE, bits).num_bytes for kind in kinds) - 2 * (hidden_size % 2)


@pytest.mark.parametrize("family", QUICK)
def test_there_and_back(family: str, tmp_path: Path) -> None:
    source = build_tiny(family, tmp_path / "source")
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    convert(source, packed, "--bits", "2.5", "--even", *with_text(CALIBRATION, tmp_path))
    assert main(["verify", str(source), str(packed)]) == 0
    before, after, quantization = read_all(source), read_all(packed), quantization_of(packed)
    num_layers = len(quantization.coded_layers)
    assert expert_bytes(after) == num_layers * NUM_EXPERTS * coded_bytes(5)
    for name in {name for name in before if ".experts." not in name}:
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
    assert main(["unpack", str(packed), str(plain)]) == 0
    restored, decoded = read_all(plain), decode_all(packed)
    assert restored.keys() == before.keys()
    assert decoded.keys() == {name for name in before if ".experts." in name}
    for name, matrix in decoded.items():
        assert torch.equal(restored[name], matrix)
        error = (matrix.float() - before[name].float()).square().sum() / before[name].float().square().sum()
        # Zeros would have 1, another expert's matrix 2.
        assert 0 < error < 1, name
    ids = torch.arange(32)[None]
    outputs = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits for path in (source, plain)]
    assert 0 < float((outputs[0] - outputs[1]).detach().square().mean() / outputs[0].detach().square().mean()) < 0.7


@pytest.mark.heavy
@pytest.mark.parametrize("family", REST)
def test_every_other_family_there_and_back(family: str, tmp_path: Path) -> None:
    """Without calibration, which is the same for every method."""
    source = build_tiny(family, tmp_path / "source")
    packed = convert(source, tmp_path / "packed", "--bits", "2.5")
    assert main(["verify", str(source), str(packed)]) == 0
    assert main(["unpack", str(packed), str(tmp_path / "plain")]) == 0
    before, restored, decoded = read_all(source), read_all(tmp_path / "plain"), decode_all(packed)
    assert decoded.keys() == {name for name in before if ".experts." in name}
    assert restored.keys() == before.keys()
    for name, matrix in before.items():
        assert torch.equal(restored[name], decoded.get(name, matrix)), name


def test_what_is_recorded_and_told(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = convert(source, tmp_path / "packed", "--bits", "3", "--even", *with_text(CALIBRATION, tmp_path))
    said = capsys.readouterr()
    assert "rule codebook at 3 bits a weight, even, on cpu: about " in said.err
    assert "relative error of coded weights 0." in said.out
    section = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert section["format_version"] == 2
    assert section["max_expert_parallel"] == NUM_EXPERTS
    assert section["layers"] == section["plain_layers"] == []
    assert section["coded_layers"][1] == {"layer": 1, "w13_bits": [6] * NUM_EXPERTS, "w2_bits": [6] * NUM_EXPERTS}
    provenance = section["provenance"]
    assert (provenance["rule"], provenance["bits"], provenance["even"]) == ("codebook", 3.0, True)
    assert (provenance["pairing"], provenance["compression"], provenance["align"]) == ("none", 0.0, False)
    assert provenance["tau"] is None
    assert provenance["calibration"]["source"] == "text"
    manifest = json.loads((packed / "puzzlemoe_manifest.json").read_text())
    assert manifest["manifest_version"] == 2
    assert [layer["bits"] for layer in manifest["coded_layers"]] == [3.0] * 3
    assert all(0 < layer["relative_error"] < 0.2 for layer in manifest["coded_layers"])
    card = (packed / "README.md").read_text()
    for part in ("| rule | `codebook` |", "| bits a weight asked for | 3, one width of codes |", "vllm serve packed"):
        assert part in card
    assert f"{NUM_EXPERTS} x 6" in card


def test_without_a_text_codes_are_plain_k_means(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = []
    for bits in ("2", "2.5", "3", "4"):
        packed = convert(source, tmp_path / bits, "--bits", bits)
        assert "no calibration text was given: codebooks are fitted to the weights by plain k-means" in (
            capsys.readouterr().err
        )
        assert {each.is_even for each in quantization_of(packed).coded_layers} == {True}
        before = read_all(source)
        changes = (matrix.float() - before[name].float() for name, matrix in decode_all(packed).items())
        errors.append(sum(float(change.square().sum()) for change in changes))
        assert main(["verify", str(source), str(packed)]) == 0
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2] > 4 * errors[3] > 0


def test_odd_sizes_are_padded_with_zeros(tmp_path: Path) -> None:
    source = build_tiny("mixtral", tmp_path / "source", hidden_size=93, head_dim=32)
    packed = convert(source, tmp_path / "packed", "--bits", "2.5", *with_text(["--even", *CALIBRATION], tmp_path))
    assert main(["verify", str(source), str(packed)]) == 0
    assert expert_bytes(read_all(packed)) == 3 * NUM_EXPERTS * coded_bytes(5, 93)
    assert main(["unpack", str(packed), str(tmp_path / "plain")]) == 0
    restored = read_all(tmp_path / "plain")
    assert all(torch.equal(restored[name], matrix) for name, matrix in decode_all(packed).items())


def test_experts_for_multi_token_prediction_stay_as_they_are(tmp_path: Path) -> None:
    source = build_tiny("deepseek_v3", tmp_path / "source", num_nextn_predict_layers=1)
    added = add_mtp_layer(source)
    packed = convert(source, tmp_path / "packed", "--bits", "2")
    before, after = read_all(source), read_all(packed)
    assert all(torch.equal(before[name], after[name]) for name in added)
    assert main(["verify", str(source), str(packed)]) == 0
    assert main(["unpack", str(packed), str(tmp_path / "plain")]) == 0
    assert read_all(tmp_path / "plain").keys() == before.keys()


def test_a_weight_that_is_not_finite_is_named(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.1.block_sparse_moe.experts.5.w3.weight"
    edit_tensors(source, lambda tensors: tensors[name][3].__setitem__(7, torch.nan))
    assert main(["convert", str(source), str(tmp_path / "packed"), "--bits", "2"]) == 1
    assert f"{name}[3, 7] is nan" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


def test_weights_too_large_to_be_weighed_are_named(
    source: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Larger than a word can hold is no reason: codes have scales."""
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    edit_tensors(source, lambda tensors: tensors[name].mul_(2.0**20))
    seen = ["--calibration", str(text), "--calibration-sequences", "1"]
    convert(source, tmp_path / "packed", "--bits", "2", "--even", *seen)
    edit_tensors(source, lambda tensors: tensors[name].mul_(2.0**60))
    for options in ([], ["--even", *seen]):
        capsys.readouterr()
        assert main(["convert", str(source), str(tmp_path / "huge"), "--bits", "2", *options]) == 1
        assert f"{name} has magnitudes up to" in capsys.readouterr().err
        assert not (tmp_path / "huge").exists()


def test_layers_of_every_kind_in_one_checkpoint(source: Path, tmp_path: Path) -> None:
    paired = convert(source, tmp_path / "paired", "--rule", "saliency")
    coded = convert(source, tmp_path / "coded", "--bits", "2")
    make_mixed(source, paired, coded, tmp_path / "mixed")
    for name in ("mixed", "paired"):
        assert main(["unpack", str(tmp_path / name), str(tmp_path / f"{name}-plain")]) == 0
    wanted = (read_all(tmp_path / "paired-plain"), decode_all(coded), load_file(source / "model.safetensors"))
    for name, tensor in read_all(tmp_path / "mixed-plain").items():
        if ".experts." in name:
            assert torch.equal(tensor, wanted[int(name.split(".")[2])][name])
