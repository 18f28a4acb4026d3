"""`vllm-puzzle plan`: cards and time against arithmetic by hand."""

import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from tests.offline.checkpoints import read_all
from tests.offline.faulty import assert_one_sentence
from tests.offline.planning import SPEED, planned
from tests.tiny import FAMILIES, HIDDEN_SIZE, build_tiny, by_expert
from vllm_puzzle.cli import main
from vllm_puzzle.offline.checkpoints.shape import find_moe_shape
from vllm_puzzle.offline.conversion.options import ConvertOptions
from vllm_puzzle.offline.reports.model_sizes import ModelSizes, read_model_sizes
from vllm_puzzle.offline.reports.sizing import CARDS_MIB, can_split, kv_bytes_per_token, size_model, work_of
from vllm_puzzle.offline.reports.sizing_report import describe_sizing
from vllm_puzzle.offline.wording import size


def model_sizes(family: str, total: int, **config: Any) -> ModelSizes:
    """Of a BF16 model of `total` bytes."""
    architecture = {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[family]
    read = AutoConfig.for_model(family, architectures=[architecture], **config)
    shape = find_moe_shape(read, "config.json")
    experts = len(shape.moe_layers) * shape.num_experts * 3 * shape.hidden_size * shape.intermediate_size * 2
    return ModelSizes(family, read, shape, experts, total - experts, experts, total - experts, "index")


def mixtral_8x7b() -> ModelSizes:
    return model_sizes(
        "mixtral",
        93_405_585_408,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        max_position_embeddings=32768,
        vocab_size=32000,
    )


def test_mixtral_by_hand() -> None:
    sizing = size_model(mixtral_8x7b(), ConvertOptions(), None, 0.9, SPEED)
    assert sizing.expert_bytes_before == 90_194_313_216 == 2 * sizing.expert_bytes_after
    assert sizing.total_bytes_after == 93_405_585_408 - 45_097_156_608
    # 32 layers, keys and values, 8 heads of 128, 2 bytes.
    assert sizing.kv_bytes_per_token == 131_072
    assert sizing.kv_bytes_of_context == 4 << 30
    fits = {each.card: (each.before, each.after) for each in sizing.cards}
    assert {card: (before and before.cards, after and after.cards) for card, (before, after) in fits.items()} == {
        "RTX 4090": (8, 4),
        "L40S": (4, 2),
        "A100 80GB": (2, 1),
        "H100 80GB": (2, 1),
        "H200": (1, 1),
        "B200": (1, 1),
    }
    # 90 % of 80 GiB, and 48,308,428,800 bytes of weights.
    before, after = fits["A100 80GB"]
    assert before is not None
    assert after is not None
    assert after.kv_gib == pytest.approx(72 - 48_308_428_800 / 2**30)
    assert after.kv_tokens == (72 * 2**30 - 48_308_428_800) // 131_072
    # On two cards each keeps 4 of the 8 heads of every token.
    assert before.kv_gib == pytest.approx(144 - 93_405_585_408 / 2**30)
    assert before.kv_tokens == (72 * 2**30 - 46_702_792_704) // 65_536


def test_the_longest_sequence_must_fit_and_memory_is_what_vllm_may_use() -> None:
    def cards(context: int, utilization: float) -> int | None:
        (card,) = (
            each
            for each in size_model(mixtral_8x7b(), ConvertOptions(), context, utilization, SPEED).cards
            if each.card == "L40S"
        )
        return card.after and card.after.cards

    # Two cards leave 36 GiB at 0.9, so 294,912 tokens and some.
    assert [cards(length, 0.9) for length in (1, 290_000, 300_000)] == [2, 2, 4]
    assert [cards(1, utilization) for utilization in (1.0, 0.51, 0.49)] == [2, 2, 4]


def test_kv_cache_of_other_kinds_of_attention() -> None:
    qwen = AutoConfig.for_model(
        "qwen3_moe",
        num_hidden_layers=48,
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
    )
    assert kv_bytes_per_token(qwen) == 48 * 2 * 4 * 128 * 2
    # Four heads on eight ranks: each has one.
    assert kv_bytes_per_token(qwen, 4) == kv_bytes_per_token(qwen, 8) == 48 * 2 * 1 * 128 * 2
    latent = SimpleNamespace(
        num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128, kv_lora_rank=512, qk_rope_head_dim=64
    )
    assert kv_bytes_per_token(latent) == kv_bytes_per_token(latent, 8) == 61 * (512 + 64) * 2


@pytest.mark.parametrize(
    ("heads", "kv_heads", "intermediate_size", "ranks", "expert_ranks", "possible"),
    [
        (32, 8, 768, 32, 8, True),
        (48, 8, 768, 32, 8, False),
        # Rows of experts do not divide, whole experts do, unless that splits pairs.
        (32, 8, 42, 4, 8, True),
        (32, 8, 42, 4, 2, False),
        (12, 3, 768, 4, 8, False),
        (12, 12, 768, 4, 8, True),
    ],
)
def test_what_ranks_can_be_split_over(
    heads: int, kv_heads: int, intermediate_size: int, ranks: int, expert_ranks: int, possible: bool
) -> None:
    config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads)
    shape: Any = SimpleNamespace(intermediate_size=intermediate_size)
    assert can_split(config, shape, ranks, expert_ranks) is possible


def test_a_model_that_fits_nowhere_says_so() -> None:
    sizes = mixtral_8x7b()
    huge = replace(sizes, other_bytes=10**14, plain_other_bytes=10**14)
    sizing = size_model(huge, ConvertOptions(), None, 0.9, SPEED)
    assert all(each.before is None and each.after is None for each in sizing.cards)
    rows = [line for line in describe_sizing(sizing).splitlines() if line.startswith(tuple(CARDS_MIB))]
    assert [re.split(r" {2,}", row)[2:] for row in rows] == [["-", "-"]] * len(CARDS_MIB)


def test_text_has_the_numbers_of_json(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--compression", "25", "--context", "100", "--gpu-memory-utilization", "0.5"]
    sizing = planned(capsys, source, *options)
    assert main(["plan", str(source), *options]) == 0
    text = capsys.readouterr().out
    assert f"{source}: MixtralForCausalLM, 3 layers, 3 of them with 8 experts of 3 x 40 x 96 weights, 2 a token" in text
    for name, before, after in (
        ("routed experts", sizing.expert_bytes_before, sizing.expert_bytes_after),
        ("everything else", sizing.other_bytes_before, sizing.other_bytes_after),
        ("total", sizing.total_bytes_before, sizing.total_bytes_after),
    ):
        assert re.search(rf"^{name} +{size(before)} +{size(after)}\b", text, re.MULTILINE)
    assert f"KV cache in BF16: {size(sizing.kv_bytes_per_token)} a token" in text
    assert "for a context of 100 tokens" in text
    assert "in 50 % of" in text
    for each in sizing.cards:
        assert each.before is not None
        assert each.after is not None
        cells = [f"{each.memory_gib:.1f}"]
        for fit in (each.before, each.after):
            cells += [str(fit.cards), f"{fit.kv_gib:.1f}", f"{fit.kv_tokens:,}"]
        assert re.search(rf"^{each.card} +{' +'.join(map(re.escape, cells))}$", text, re.MULTILINE)
    assert "an estimate" in text
    for conversion in sizing.conversions:
        assert f"rule {conversion.rule}, aligned, {conversion.estimate}" in text


def test_converting_is_expected_to_take_what_the_converter_says(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), str(tmp_path / "packed")]) == 0
    said = re.search(r"about .* of memory", capsys.readouterr().err)
    assert said
    calibrated, blind = planned(capsys, source).conversions
    assert (calibrated.rule, calibrated.calibration_tokens) == ("compensated", 128 * 256)
    assert (blind.rule, blind.calibration_tokens) == ("saliency", 0)
    assert str(blind.estimate) == said[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_dense_is_what_lies_in_layers(family: str, tmp_path: Path) -> None:
    source = build_tiny(family, tmp_path / "source")
    sizes = read_model_sizes(str(source))
    dense = sum(
        math.prod(tensor.shape)
        for name, tensor in by_expert(read_all(source)).items()
        if ".layers." in name and ".experts." not in name
    )
    # The norm after the last layer is counted with them, and what the family has beside layers and embeddings.
    for calibrated in (False, True):
        work = work_of(sizes, calibrated)
        assert work.dense_weights == pytest.approx(dense + HIDDEN_SIZE, rel=0.02)


def test_a_reader_that_has_seen_enough_is_no_error(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert main(["plan", str(source)]) == 1


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--compression", "60"], ("--compression 60",)),
        (["--context", "0"], ("--context 0",)),
        (["--gpu-memory-utilization", "1.5"], ("--gpu-memory-utilization 1.5",)),
        (["--gpu-memory-utilization", "0"], ("--gpu-memory-utilization 0",)),
    ],
)
def test_options_out_of_range(
    options: list[str], parts: tuple[str, ...], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_one_sentence(capsys, ["plan", str(source), *options], *parts)
