"""`vllm-puzzle inspect`: what it counts against decoded tensors, what it shows against config and manifest."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from tests.offline.checkpoints import read_all, slots_of
from tests.offline.faulty import assert_one_sentence
from tests.tiny import NUM_EXPERTS, build_tiny, short_text
from vllm_puzzle.cli import main
from vllm_puzzle.format import WORD16, parse_packed_name, unpack
from vllm_puzzle.offline.checkpoints.checkpoint import Checkpoint
from vllm_puzzle.offline.checkpoints.manifest import MANIFEST_FILE, LayerEntry, Manifest
from vllm_puzzle.offline.reports.inspection import Inspection, inspect_checkpoint

NUM_EXPONENTS = 1 << WORD16.exponent_bits
SVG = re.compile(r"<svg.*?</svg>", re.DOTALL)


def convert(family: str, directory: Path, *options: str) -> Path:
    source, packed = build_tiny(family, directory / "source"), directory / "packed"
    text = directory / "text & <b>.txt"
    text.write_text(short_text(60))
    assert main(["convert", str(source), str(packed), "--calibration", str(text), "--seed", "5", *options]) == 0
    return packed


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return convert("mixtral", tmp_path, "--rule", "saliency", "--compression", "30")


def inspected(capsys: pytest.CaptureFixture[str], packed: Path, *options: str) -> Inspection:
    capsys.readouterr()
    assert main(["inspect", str(packed), "--json", *options]) == 0
    return Inspection.model_validate_json(json.dumps(json.loads(capsys.readouterr().out)["result"]))


def write_manifest(packed: Path, loss: float | None = 0.0125) -> list[LayerEntry]:
    entries = [
        LayerEntry(
            layer=slots.layer,
            pairs=slots.pairs,
            estimated_loss=None if loss is None else loss * (slots.layer + 1),
            coactivation=None,
            shared_fraction=0.5,
            kept_fraction=0.5,
            relative_error=0.25 + slots.layer / 100,
        )
        for slots in slots_of(packed)
    ]
    manifest = Manifest(tool_version="0.1.0", shards=[], layers=entries)
    (packed / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return entries


def edit_provenance(packed: Path, **fields: Any) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["provenance"].update(fields)
    (packed / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", ["--rule", "saliency", "--compression", "30"]),
        ("qwen2_moe", ["--rule", "paper"]),
        ("olmoe", ["--rule", "paper", "--compression", "0"]),
    ],
)
def test_counts_are_those_of_decoded_tensors(
    family: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = convert(family, tmp_path, *options)
    inspection = inspected(capsys, packed)
    tensors = read_all(packed)
    layers = slots_of(packed)
    assert [layer.layer for layer in inspection.layers] == [slots.layer for slots in layers]
    for slots, layer in zip(layers, inspection.layers, strict=True):
        paired = {slots.first_member(slot) for slot in range(slots.pairs)}
        elements = shared = kept = 0
        exponents = torch.zeros(NUM_EXPONENTS, dtype=torch.int64)
        for name, words in tensors.items():
            parsed = parse_packed_name(name)
            if parsed is None or f".layers.{slots.layer}." not in name:
                continue
            first, second = (unpack(words, member) for member in (0, 1))
            if parsed[1] in paired:
                elements += words.numel()
                shared += int(((first != 0) & (second != 0)).sum())
                kept += int((first != 0).sum() + (second != 0).sum())
            magnitudes = torch.maximum(first.abs(), second.abs()).float()
            # frexp's mantissas lie in 0.5 to 1; a word's field 1 stands for 2^-15.
            fields = torch.where(magnitudes > 0, torch.frexp(magnitudes).exponent + 15, 0)
            exponents += torch.bincount(fields.flatten(), minlength=NUM_EXPONENTS)
        assert (layer.slots, layer.pairs) == (slots.num_slots, slots.pairs)
        assert layer.shared_fraction == (shared / elements if elements else 0)
        assert layer.kept_fraction == (kept / (2 * elements) if elements else 1)
        assert layer.exponents == exponents.tolist()
    words = [tensor for name, tensor in tensors.items() if parse_packed_name(name)]
    assert sum(inspection.exponents) == sum(tensor.numel() for tensor in words)
    assert inspection.packed_bytes == sum(tensor.nbytes for tensor in words)
    assert inspection.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert inspection.smallest_exponent == -15


def test_provenance_is_that_of_the_config(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    inspection = inspected(capsys, packed)
    # Version 1 does not write what is said of codes.
    assert inspection.provenance.model_dump(exclude={"bits", "even"}) == config["provenance"]
    for field in ("format_version", "bits", "num_experts", "hidden_size", "intermediate_size", "max_expert_parallel"):
        assert getattr(inspection, field) == config[field]
    assert main(["inspect", str(packed)]) == 0
    text = capsys.readouterr().out
    calibration = inspection.provenance.calibration
    assert calibration is not None
    for line in (
        "format version  1, words of 16 bits",
        "rule            saliency",
        "aligned         yes",
        "pairing         random",
        "compression     30 %",
        "seed            5",
        f"calibration     text & <b>.txt, {calibration.sequences} sequences of {calibration.sequence_length} tokens, "
        f"SHA-256 {calibration.sha256}",
        f"source SHA-256  {inspection.provenance.source_sha256}",
        f"tool version    {inspection.provenance.tool_version}",
    ):
        assert line in text.splitlines()


def table_rows(text: str) -> list[list[str]]:
    return [re.split(r" {2,}", line.split("|")[0].strip()) for line in re.findall(r"^ *\d+  .*\|$", text, re.MULTILINE)]


@pytest.mark.parametrize(
    ("loss", "shown"), [(0.0125, ["0.0125", "0.025", "0.0375"]), (None, ["not estimated"] * 3)], ids=["loss", "none"]
)
def test_losses_are_those_of_the_manifest(
    loss: float | None, shown: list[str], packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = write_manifest(packed, loss)
    inspection = inspected(capsys, packed)
    assert inspection.has_manifest
    assert [layer.estimated_loss for layer in inspection.layers] == [entry.estimated_loss for entry in entries]
    assert [layer.relative_error for layer in inspection.layers] == [entry.relative_error for entry in entries]
    assert main(["inspect", str(packed)]) == 0
    rows = table_rows(capsys.readouterr().out)
    assert [row[5] for row in rows] == shown
    assert [row[6] for row in rows] == ["0.2500", "0.2600", "0.2700"]
    for row, layer in zip(rows, inspection.layers, strict=True):
        assert row[:3] == [str(layer.layer), str(layer.slots), str(layer.pairs)]
        assert row[3:5] == [f"{layer.shared_fraction:.1%}", f"{layer.kept_fraction:.1%}"]
        assert layer.slots + layer.pairs == NUM_EXPERTS


def test_without_calibration_no_loss_is_told(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even one that an earlier version wrote into the manifest."""
    write_manifest(packed)
    edit_provenance(packed, calibration=None)
    inspection = inspected(capsys, packed, "--html", str(packed / "page.html"))
    assert {layer.estimated_loss for layer in inspection.layers} == {None}
    assert main(["inspect", str(packed)]) == 0
    text, page = capsys.readouterr().out, (packed / "page.html").read_text()
    assert [row[5:] for row in table_rows(text)] == [["not estimated", f"0.2{digit}00"] for digit in "567"]
    assert "Estimated loss: not estimated." in page
    assert "residual stream" not in text + page


def test_without_a_manifest_losses_are_not_recorded(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (packed / MANIFEST_FILE).unlink(missing_ok=True)
    inspection = inspected(capsys, packed, "--html", str(packed / "page.html"))
    assert not inspection.has_manifest
    assert {(layer.estimated_loss, layer.relative_error) for layer in inspection.layers} == {(None, None)}
    assert main(["inspect", str(packed)]) == 0
    assert all(row[5:] == ["not recorded", "not recorded"] for row in table_rows(capsys.readouterr().out))
    page = (packed / "page.html").read_text()
    assert "Estimated loss: not recorded." in page
    assert len(SVG.findall(page)) == 3


class _Page(HTMLParser):
    """Tags with their attributes, and the texts of cells."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self._in_cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data


def test_the_page_has_table_and_plots_and_needs_nothing_else(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(packed)
    file = packed / "page.html"
    inspection = inspected(capsys, packed, "--html", str(file))
    content = file.read_text(encoding="utf-8")
    page = _Page(content)
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & {tag for tag, _ in page.tags}
    assert not {"src", "href", "xlink:href"} & {name for _, attributes in page.tags for name in attributes}
    assert "url(" not in content
    assert "@import" not in content
    for layer in inspection.layers:
        assert f"{layer.shared_fraction:.1%}" in page.cells
        assert f"{layer.kept_fraction:.1%}" in page.cells
        assert f"{layer.relative_error:.4f}" in page.cells
    assert inspection.provenance.source_sha256 in page.cells
    histogram, by_layer, densities, loss, error = (ElementTree.fromstring(svg) for svg in SVG.findall(content))
    heights = [float(bar.attrib["height"]) for bar in histogram.iter("rect")]
    largest = max(inspection.exponents)
    assert heights == pytest.approx([176 * count / largest for count in inspection.exponents], abs=0.01)
    layers = len(inspection.layers)
    shades = [float(cell.attrib["fill-opacity"]) for cell in by_layer.iter("rect")]
    counts = [(count, max(layer.exponents)) for layer in inspection.layers for count in layer.exponents]
    assert shades == pytest.approx([count / largest for count, largest in counts], abs=0.001)
    assert [sum(1 for _ in svg.iter("rect")) for svg in (densities, loss, error)] == [2 * layers, layers, layers]
    titles = [title.text for title in densities.iter("title")]
    assert f"layer 2: {inspection.layers[2].kept_fraction:.4g} kept" in titles


def test_what_comes_from_files_is_escaped(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_provenance(packed, rule="<script>alert(1)</script>", tool_version="\"'><img src=x>", pairing="{{ 7 * 7 }}")
    folder = packed.rename(packed.with_name("a<b>&c"))
    file = folder / "page.html"
    inspected(capsys, folder, "--html", str(file))
    content = file.read_text()
    page = _Page(content)
    assert not {"script", "img", "b"} & {tag for tag, _ in page.tags}
    for cell in ("<script>alert(1)</script>", "\"'><img src=x>", "{{ 7 * 7 }}"):
        assert cell in page.cells
    assert "<title>" + str(folder).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in content
    assert any(cell.startswith("text & <b>.txt, ") for cell in page.cells)


def test_reading_is_one_slot_at_a_time_and_progress_ends_at_the_total(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    read = Checkpoint.read

    def record(self: Checkpoint, names: list[str]) -> dict[str, torch.Tensor]:
        nonlocal most
        most = max(most, len(names))
        return read(self, names)

    monkeypatch.setattr("vllm_puzzle.offline.checkpoints.checkpoint.Checkpoint.read", record)
    steps: list[tuple[int, int]] = []
    inspection = inspect_checkpoint(packed, lambda *step: steps.append(step))
    assert most == 3
    assert {total for _, total in steps} == {inspection.packed_bytes}
    assert sum(num_bytes for num_bytes, _ in steps) == inspection.packed_bytes


def test_a_page_is_never_overwritten(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.html"
    file.write_text("mine")
    assert_one_sentence(capsys, ["inspect", str(packed), "--html", str(file)], f"--html {file} exists already")
    assert file.read_text() == "mine"
    missing = tmp_path / "nowhere" / "page.html"
    assert_one_sentence(capsys, ["inspect", str(packed), "--html", str(missing)], f"--html {missing} cannot be written")


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda packed: (packed / MANIFEST_FILE).write_text("{"), (MANIFEST_FILE, "cannot be read as JSON")),
        (lambda packed: (packed / MANIFEST_FILE).write_text("{}"), (MANIFEST_FILE, "convert its source again")),
        (lambda packed: next(packed.glob("*00002-of*.safetensors")).unlink(), ("is missing",)),
        (lambda packed: edit_provenance(packed, seed="5"), ("provenance.seed",)),
    ],
    ids=["manifest is not JSON", "manifest breaks its schema", "missing shard", "config breaks its schema"],
)
def test_a_faulty_checkpoint(
    spoil: Callable[[Path], object], parts: tuple[str, ...], packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(packed)
    assert_one_sentence(capsys, ["inspect", str(packed)], *parts)


def test_a_checkpoint_that_is_not_packed(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_sentence(capsys, ["inspect", str(source)], "not packed")
