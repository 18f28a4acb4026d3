"""`vllm-puzzle plan` and `inspect` on coded experts."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from tests.offline.checkpoints import expert_bytes, read_all
from tests.offline.coded import convert, make_mixed, quantization_of
from tests.offline.faulty import assert_one_sentence
from tests.offline.planning import planned
from tests.tiny import HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, NUM_LAYERS, build_tiny, short_text
from vllm_puzzle.cli import main
from vllm_puzzle.format import unpack_codes
from vllm_puzzle.offline.reports.inspection import Inspection

SVG = re.compile(r"<svg.*?</svg>", re.DOTALL)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its codes of unequal widths."""
    root = tmp_path_factory.mktemp("coded")
    (root / "text").write_text(short_text(60))
    source = build_tiny("mixtral", root / "source")
    options = ["--calibration", str(root / "text"), "--calibration-sequences", "1"]
    return source, convert(source, root / "packed", "--bits", "2.7", *options)


def inspected(capsys: pytest.CaptureFixture[str], packed: Path, *options: str) -> Inspection:
    capsys.readouterr()
    assert main(["inspect", str(packed), "--json", *options]) == 0
    return Inspection.model_validate_json(json.dumps(json.loads(capsys.readouterr().out)["result"]))


def test_the_plan_is_what_converting_gives(checkpoints: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, packed = checkpoints
    sizing = planned(capsys, source, "--bits", "2.7")
    assert (sizing.bits, sizing.pairs, sizing.compression) == (2.7, 0, 0.0)
    written = expert_bytes(read_all(packed))
    # The last bytes of a budget may be too few for another step.
    assert 0.97 * sizing.expert_bytes_after < written <= sizing.expert_bytes_after
    assert [each.rule for each in sizing.conversions] == ["codebook", "codebook"]
    assert main(["plan", str(source), "--bits", "2.7"]) == 0
    assert "\ncodes of 2.7 bits a weight; sizes from the tensors' headers\n" in capsys.readouterr().out
    assert_one_sentence(capsys, ["plan", str(source), "--bits", "5"], "--bits 5 is outside 2 to 4")


def test_widths_and_codebooks_are_those_of_the_tensors(
    checkpoints: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, packed = checkpoints
    file = tmp_path / "page.html"
    inspection = inspected(capsys, packed, "--html", str(file))
    tensors, quantization = read_all(packed), quantization_of(packed)
    assert inspection.layers == []
    assert inspection.packed_bytes == expert_bytes(tensors)
    for layer, codes in zip(inspection.coded_layers, quantization.coded_layers, strict=True):
        assert (layer.layer, layer.w13_bits, layer.w2_bits) == (codes.layer, codes.w13_bits, codes.w2_bits)
        assert layer.bits == pytest.approx(sum(codes.w13_bits) / NUM_EXPERTS / 2)
        assert layer.bits < layer.stored_bits < layer.bits + 2
        assert layer.estimated_loss is not None
        assert layer.estimated_loss > 0
        expert = f"model.layers.{layer.layer}.block_sparse_moe.experts.0"
        for codebook, name, bits, columns in (
            (layer.codebooks[0], "w1", codes.w13_bits[0], HIDDEN_SIZE),
            (layer.codebooks[1], "w2", codes.w2_bits[0], INTERMEDIATE_SIZE),
        ):
            stored = unpack_codes(tensors[f"{expert}.{name}.weight_packed"], bits, columns)
            assert codebook.counts == torch.bincount(stored.flatten(), minlength=1 << bits).tolist()
            assert torch.equal(torch.tensor(codebook.points).bfloat16(), tensors[f"{expert}.{name}.weight_codebook"])
    content = file.read_text()
    widths, *plots = (ElementTree.fromstring(svg) for svg in SVG.findall(content))
    assert len(list(widths.iter("rect"))) == 2 * NUM_LAYERS * NUM_EXPERTS
    codebooks = [codebook for layer in inspection.coded_layers for codebook in layer.codebooks]
    assert [len(list(plot.iter("circle"))) for plot in plots] == [len(codebook.points) for codebook in codebooks]
    assert "layer 0, expert 0, gate and up" in content
    assert "Words by stored exponent" not in content


def test_what_is_printed(checkpoints: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, packed = checkpoints
    inspection = inspected(capsys, packed)
    assert main(["inspect", str(packed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"experts         {NUM_EXPERTS} of 3 x {INTERMEDIATE_SIZE} x {HIDDEN_SIZE} a layer" in lines
    assert "rule            codebook" in lines
    bits = next(line for line in lines if line.startswith("bits "))
    assert "2.7 of codes a weight asked for, " in bits
    rows = [re.split(r" {2,}", line.strip()) for line in lines if re.match(r"\d ", line)]
    for row, layer in zip(rows, inspection.coded_layers, strict=True):
        assert row[:3] == [str(layer.layer), f"{layer.bits:.2f}", f"{layer.stored_bits:.2f}"]
        assert sum(int(part.split(" x ")[0]) for part in row[3].split(", ")) == NUM_EXPERTS


def test_layers_of_every_kind_are_shown(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paired = convert(source, tmp_path / "paired", "--rule", "saliency")
    coded = convert(source, tmp_path / "coded", "--bits", "2")
    mixed = make_mixed(source, paired, coded, tmp_path / "mixed")
    inspection = inspected(capsys, mixed, "--html", str(tmp_path / "page.html"))
    assert [layer.layer for layer in inspection.layers] == [0]
    assert [layer.layer for layer in inspection.coded_layers] == [1]
    assert inspection.plain_layers == [2]
    assert main(["inspect", str(mixed)]) == 0
    text = capsys.readouterr().out
    assert "codes of 4 bits, words of 16 bits" in text
    assert "As in the source: the experts of the layers 2." in text
    content = (tmp_path / "page.html").read_text()
    assert "Words by stored exponent" in content
    assert "<h2>Layers of coded experts</h2>" in content
