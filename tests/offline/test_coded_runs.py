"""Conversions to codes that spend a budget, are interrupted, or run in several processes."""

from pathlib import Path

import pytest
import torch

from tests.offline.coded import convert, quantization_of
from tests.offline.faulty import edit_tensors, snapshot
from tests.offline.interrupted import BreakAt, with_text
from tests.tiny import NUM_EXPERTS, NUM_LAYERS, build_tiny
from vllm_puzzle.cli import main
from vllm_puzzle.format import LayerCodes

SEEN = ["--calibration", "TEXT", "--calibration-sequences", "1"]
RECIPES = [["--bits", "2.5", "--even", *SEEN], ["--bits", "2.7", *SEEN], ["--bits", "3"]]


def mean_widths(packed: Path) -> list[float]:
    """By layer."""
    return [sum(codes.w13_bits) / NUM_EXPERTS for codes in quantization_of(packed).coded_layers]


def test_a_budget_goes_where_it_gains_most(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def make_sensitive(tensors: dict[str, torch.Tensor]) -> None:
        for layer, experts in ((1, (1, 6)), (2, range(NUM_EXPERTS))):
            for expert in experts:
                tensors[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"] *= 30

    edit_tensors(source, make_sensitive)
    packed = convert(source, tmp_path / "packed", "--bits", "2.4")
    assert "bits: 2.00 to " in capsys.readouterr().err
    insensitive, one, sensitive = quantization_of(packed).coded_layers
    assert insensitive == LayerCodes.even(0, NUM_EXPERTS, 4)
    assert min(sensitive.w13_bits) > 4
    assert min(one.w13_bits[1], one.w13_bits[6]) > max(bits for e, bits in enumerate(one.w13_bits) if e not in (1, 6))
    even = convert(source, tmp_path / "even", "--bits", "2.4", "--even")
    assert all(codes.is_even for codes in quantization_of(even).coded_layers)
    assert len(set(mean_widths(even))) > 1
    # Not more bytes than the same width everywhere.
    plain = convert(source, tmp_path / "plain", "--bits", "2.5", "--even")
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (packed, plain)]
    assert sizes[0] <= sizes[1] + 4096


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", RECIPES, ids=" ".join)
def test_resuming_gives_the_same_bytes(
    recipe: list[str], source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = with_text(recipe, text)
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    unbroken = BreakAt(None)
    with monkeypatch.context() as patch:
        unbroken.install(patch)
        convert(source, tmp_path / "whole" / "packed", *options)
    arguments = ["convert", str(source), str(tmp_path / "broken" / "packed"), *options]
    for number, more in ((unbroken.writes // 2, []), (5, ["--resume"])):
        with monkeypatch.context() as patch:
            BreakAt(number).install(patch)
            assert main([*arguments, *more]) == 130
    assert main([*arguments, "--resume"]) == 0
    assert snapshot(tmp_path / "broken") == snapshot(tmp_path / "whole")


def test_other_bits_do_not_resume(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["convert", str(source), str(tmp_path / "packed")]
    with monkeypatch.context() as patch:
        BreakAt(80).install(patch)
        assert main([*arguments, "--bits", "2"]) == 130
    for change, part in (
        (["--bits", "3"], "with --bits 2.0, now it is with --bits 3.0"),
        (["--bits", "2", "--even"], "without --even, now it is with --even"),
        ([], "with --bits 2.0, now it is without --bits"),
    ):
        capsys.readouterr()
        assert main([*arguments, *change, "--resume"]) == 1
        assert f"was begun {part}; give" in capsys.readouterr().err


@pytest.mark.heavy
def test_processes_side_by_side_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name, jobs in (("one", "1"), ("two", "2")):
        (tmp_path / name).mkdir()
        convert(source, tmp_path / name / "packed", "--bits", "2.3", "--jobs", jobs)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_dense_layers_are_left_alone_and_progress_is_told(tmp_path: Path, text: Path) -> None:
    from vllm_puzzle.offline.conversion.convert import convert as convert_checkpoint
    from vllm_puzzle.offline.conversion.options import ConvertOptions

    source, steps, said = build_tiny("qwen2_moe", tmp_path / "source"), [], []
    options = ConvertOptions(calibration=text, calibration_sequences=1, bits=2.2)
    convert_checkpoint(source, tmp_path / "packed", options, said.append, lambda *step: steps.append(step))
    assert [codes.layer for codes in quantization_of(tmp_path / "packed").coded_layers] == [0, 2]
    assert len({total for _, total in steps}) == 1
    assert sum(num_bytes for num_bytes, _ in steps) == steps[0][1]
    assert said[0].startswith("rule codebook at 2.2 bits a weight on cpu: about ")
    assert said[1].endswith("of the residual stream's energy a layer")
    assert len(mean_widths(tmp_path / "packed")) == NUM_LAYERS - 1
