"""`vllm-puzzle plan`: sizes of folders, indices and hub ids against files that were really converted."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.offline.checkpoints import expert_bytes, quantize, read_all
from tests.offline.faulty import assert_one_sentence
from tests.offline.planning import leave_only_the_index, planned, total_bytes
from tests.tiny import FAMILIES, add_mtp_layer, build_tiny
from vllm_puzzle.cli import main
from vllm_puzzle.format import INDEX_FILE, parse_packed_name


@pytest.mark.parametrize(
    ("family", "compression", "overrides"),
    [
        *((family, 50, {}) for family in FAMILIES),
        ("qwen2_moe", 30, {}),
        ("olmoe", 0, {}),
        # An odd number leaves one expert alone.
        ("mixtral", 42, {"num_local_experts": 7}),
        ("mixtral", 43, {"num_local_experts": 7}),
    ],
)
def test_bytes_are_those_of_converted_files(
    family: str, compression: float, overrides: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, packed = build_tiny(family, tmp_path / "source", **overrides), tmp_path / "packed"
    options = ["--compression", str(compression)]
    assert main(["convert", str(source), str(packed), "--rule", "saliency", "--no-align", *options]) == 0
    capsys.readouterr()
    sizing = planned(capsys, source, *options)
    before, after = read_all(source), read_all(packed)
    assert (sizing.expert_bytes_before, sizing.expert_bytes_after) == (expert_bytes(before), expert_bytes(after))
    assert (sizing.total_bytes_before, sizing.total_bytes_after) == (total_bytes(before), total_bytes(after))
    assert sizing.other_bytes_before == sizing.other_bytes_after == total_bytes(before) - expert_bytes(before)
    layers = json.loads((packed / "config.json").read_text())["quantization_config"]["layers"]
    assert (sizing.pairs, sizing.moe_layers) == (sum(slots["pairs"] for slots in layers), len(layers))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_index_says_what_the_headers_say(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = build_tiny(family, tmp_path / "source")
    by_headers = planned(capsys, source)
    leave_only_the_index(source, total_size=by_headers.total_bytes_before)
    for file in source.glob("tokenizer*"):
        file.unlink()
    by_index = planned(capsys, source)
    assert (by_headers.read_from, by_index.read_from) == ("headers", "index")
    assert by_index == by_headers.model_copy(update={"read_from": "index"})


def test_fp8_sources_are_counted_as_they_lie_and_as_they_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, packed = build_tiny("deepseek_v3", tmp_path / "source"), tmp_path / "packed"
    add_mtp_layer(source)
    quantize(source, tmp_path / "plain")
    assert main(["convert", str(source), str(packed), "--rule", "paper"]) == 0
    capsys.readouterr()
    sizing = planned(capsys, source)
    before, after = read_all(source), read_all(packed)
    assert (sizing.total_bytes_before, sizing.total_bytes_after) == (total_bytes(before), total_bytes(after))
    assert sizing.expert_bytes_after == sum(tensor.nbytes for name, tensor in after.items() if parse_packed_name(name))
    # The converter makes of one byte for a weight, and its share of a scale, two for a pair.
    assert sizing.expert_bytes_before > sizing.expert_bytes_after
    leave_only_the_index(source, total_size=sizing.total_bytes_before)
    by_index = planned(capsys, source)
    assert by_index.expert_bytes_before == sizing.expert_bytes_before
    assert by_index.other_bytes_before == sizing.other_bytes_before
    # What is FP8 beside the experts is not in the index.
    assert by_index.other_bytes_after == pytest.approx(sizing.other_bytes_after, rel=0.1)


def test_a_hub_id_is_looked_up_by_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cached = build_tiny("qwen3_moe", tmp_path / "cached")
    local = planned(capsys, cached)
    leave_only_the_index(cached, total_size=float(local.total_bytes_before))
    asked = []

    def download(model: str, file: str) -> str:
        asked.append((model, file))
        return str(cached / file)

    monkeypatch.setattr("vllm_puzzle.offline.reports.model_sizes.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    sizing = planned(capsys, "org/name")
    assert asked == [("org/name", "config.json"), ("org/name", INDEX_FILE)]
    assert sizing == local.model_copy(update={"model": "org/name", "read_from": "index"})


@pytest.mark.parametrize("model", ["nowhere", "/no/where", "a/b/c", "../nowhere", "-x/y"])
def test_what_is_no_hub_id_is_not_looked_up(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "vllm_puzzle.offline.reports.model_sizes.hf_hub_download", lambda *names: pytest.fail("asked the hub")
    )
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(capsys, ["plan", "--", model], f"{model} does not exist", "hub id")


def test_without_a_network_a_hub_id_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(capsys, ["plan", "no-such-org/no-such-model"], "no-such-org/no-such-model", "hub", "no network")


def test_what_the_hub_refuses_is_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(model: str, file: str) -> str:
        raise ConnectionResetError("reset\n\nby peer")

    monkeypatch.setattr("vllm_puzzle.offline.reports.model_sizes.hf_hub_download", refuse)
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(capsys, ["plan", "org/name"], "org/name", "reset by peer")


def test_faulty_models(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    total = total_bytes(read_all(source))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert_one_sentence(capsys, ["plan", str(source)], "already quantized (fp8)")
    (source / "config.json").write_text(json.dumps(config))
    leave_only_the_index(source)
    assert_one_sentence(capsys, ["plan", str(source)], INDEX_FILE, "total_size")
    index = json.loads((source / INDEX_FILE).read_text())

    def write_index(total_size: int, weight_map: dict[str, str]) -> None:
        content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (source / INDEX_FILE).write_text(json.dumps(content))

    write_index(1000, index["weight_map"])
    assert_one_sentence(capsys, ["plan", str(source)], "1,000 bytes", "torch.bfloat16")
    lacking = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    write_index(total, {name: shard for name, shard in index["weight_map"].items() if name != lacking})
    assert_one_sentence(capsys, ["plan", str(source)], "lacks 1 of 72", lacking)
    (source / INDEX_FILE).unlink()
    assert_one_sentence(capsys, ["plan", str(source)], "only safetensors")
    (source / "config.json").unlink()
    assert_one_sentence(capsys, ["plan", str(source)], "config.json is missing")
