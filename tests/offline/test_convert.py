"""Conversion of every family: sizes, what stays untouched, provenance, and the way back."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from tests.offline.checkpoints import expert_bytes, read_all
from tests.tiny import FAMILIES, INTERMEDIATE_SIZE, build_tiny, dated_text
from vllm_puzzle.cli import main
from vllm_puzzle.format import PuzzleMoEQuantizationConfig, parse_packed_name

FEW_SEQUENCES = ["--calibration-sequences", "4"]
TEXT = dated_text(400)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(request.param, tmp_path_factory.mktemp(request.param) / "source")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("rule", "compression", "share"),
    [("paper", 50, 0.5), ("compensated", 25, 0.75), ("saliency", 12.5, 0.875), ("paper", 12.5, 0.875), (None, 0, 1.0)],
)
def test_expert_bytes_and_untouched_tensors(
    source: Path, tmp_path: Path, calibration: Path, rule: str | None, compression: float, share: float
) -> None:
    packed = tmp_path / "packed"
    options = ["--calibration", str(calibration), "--compression", str(compression), *FEW_SEQUENCES]
    if rule is not None:
        options += ["--rule", rule]
    assert main(["convert", str(source), str(packed), *options]) == 0
    before, after = read_all(source), read_all(packed)
    assert expert_bytes(after) == share * expert_bytes(before)
    outside = {name for name in before if ".experts." not in name}
    assert {name for name in after if parse_packed_name(name) is None} == outside
    for name in outside:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
    assert main(["verify", str(source), str(packed)]) == 0


def test_config_provenance_tokenizer_and_card(source: Path, tmp_path: Path, calibration: Path) -> None:
    packed = tmp_path / "packed"
    options = ["--calibration", str(calibration), *FEW_SEQUENCES, "--rule", "paper", "--seed", "7"]
    assert main(["convert", str(source), str(packed), *options]) == 0
    config = json.loads((packed / "config.json").read_text())
    quantization = PuzzleMoEQuantizationConfig.parse(config.pop("quantization_config"))
    assert config.pop("experts_implementation") == "puzzlemoe"
    assert config == json.loads((source / "config.json").read_text())
    assert quantization.intermediate_size == INTERMEDIATE_SIZE
    provenance = quantization.provenance
    assert (provenance.rule, provenance.tau, provenance.seed) == ("paper", 0.4, 7)
    assert (provenance.align, provenance.pairing) == (False, "random")
    assert provenance.calibration is not None
    assert provenance.calibration.source == calibration.name
    assert AutoTokenizer.from_pretrained(packed).encode("pears") == AutoTokenizer.from_pretrained(source).encode(
        "pears"
    )
    card = (packed / "README.md").read_text()
    assert f"{expert_bytes(read_all(packed)):,} (50.0%)" in card
    assert "vllm serve packed --quantization puzzlemoe" in card


@pytest.mark.heavy
@pytest.mark.parametrize("rule", ["paper", "compensated"])
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(rule: str, tmp_path: Path, calibration: Path) -> None:
    source = build_tiny("qwen3_moe", tmp_path / "source")
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        options = ["--calibration", str(calibration), *FEW_SEQUENCES, "--rule", rule, "--seed", seed]
        assert main(["convert", str(source), str(tmp_path / name), *options]) == 0
    files = sorted(file.name for file in (tmp_path / "a").iterdir() if file.name != "README.md")
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert read_all(tmp_path / "a").keys() != read_all(tmp_path / "c").keys()


@pytest.mark.heavy
def test_unpacking_gives_plain_experts_within_the_rule(source: Path, tmp_path: Path, calibration: Path) -> None:
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    options = ["--calibration", str(calibration), *FEW_SEQUENCES, "--rule", "paper", "--compression", "25"]
    assert main(["convert", str(source), str(packed), *options]) == 0
    assert main(["unpack", str(packed), str(plain)]) == 0
    before, after = read_all(source), read_all(plain)
    assert before.keys() == after.keys()
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    changed = 0
    for name, tensor in before.items():
        kept = after[name] != 0
        assert torch.equal(torch.signbit(tensor[kept]), torch.signbit(after[name][kept]))
        # Singles differ only where a magnitude below the smallest storable one was raised or dropped.
        changed += bool((tensor.float() - after[name].float()).abs().max() > 2.0**-15)
    # Four of eight experts are in pairs: half of the expert matrices of every MoE layer.
    assert changed == sum(".experts." in name for name in before) / 2


@pytest.mark.heavy
@pytest.mark.parametrize("rule", [["--rule", "paper"], ["--rule", "saliency", "--no-align"]], ids=" ".join)
def test_calibration_decides_what_is_kept(rule: list[str], source: Path, tmp_path: Path, calibration: Path) -> None:
    with_calibration = ["--calibration", str(calibration), *FEW_SEQUENCES, *rule]
    assert main(["convert", str(source), str(tmp_path / "with"), *with_calibration]) == 0
    assert main(["convert", str(source), str(tmp_path / "without"), "--calibration", "none", *rule]) == 0
    with_text, without = read_all(tmp_path / "with"), read_all(tmp_path / "without")
    assert with_text.keys() == without.keys()
    assert any(not torch.equal(with_text[name], without[name]) for name in without if parse_packed_name(name))


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    source = build_tiny("mixtral", tmp_path / "source")
    old = os.umask(0o027)
    try:
        assert main(["convert", str(source), str(tmp_path / "packed")]) == 0
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "packed").stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "packed").iterdir()} == {0o640}


@pytest.mark.parametrize("rule", ["paper", "compensated"])
def test_other_floating_types_become_bfloat16(rule: str, tmp_path: Path, calibration: Path) -> None:
    source = build_tiny("mixtral", tmp_path / "source")
    tensors = {name: tensor.float() for name, tensor in read_all(source).items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    options = ["--rule", rule, "--calibration", str(calibration), *FEW_SEQUENCES]
    assert main(["convert", str(source), str(tmp_path / "packed"), *options]) == 0
    assert main(["verify", str(source), str(tmp_path / "packed")]) == 0
    after = read_all(tmp_path / "packed")
    assert after["lm_head.weight"].dtype == torch.float32
    assert expert_bytes(after) == expert_bytes(tensors) / 4
