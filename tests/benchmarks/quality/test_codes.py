"""Codes made layer by layer, and the budgets that give them their widths."""

import random
from pathlib import Path

import pytest
import torch

from benchmarks.quality.codes import EVEN_CODES, spend_alone
from benchmarks.quality.methods import calibrate, mean_bits
from benchmarks.quality.model import QualityModel
from benchmarks.quality.peers import CompressedLayer
from tests.benchmarks.quality.layers import HIDDEN_SIZE, INTERMEDIATE_SIZE, random_experts, random_tokens
from tests.tiny import build_tiny


def test_wider_codes_lose_less_and_count_everything() -> None:
    experts, tokens = random_experts(), random_tokens()
    made = [peer.method(experts, tokens, random.Random(0)) for peer in EVEN_CODES.values()]
    errors = [tokens.relative_output_error(experts, layer.experts) for layer in made]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]
    # Rows are filled up to 32 codes; two numbers a point and one a row, in bfloat16.
    words = INTERMEDIATE_SIZE * 1 + HIDDEN_SIZE // 2 * 1
    stored = 32 * 4 * words + 2 * 16 * 2 * 16 + 16 * (2 * INTERMEDIATE_SIZE + HIDDEN_SIZE)
    assert made[0].bits == pytest.approx(stored / (3 * INTERMEDIATE_SIZE * HIDDEN_SIZE))


def test_a_budget_is_spent_by_layer_or_by_expert(tmp_path: Path) -> None:
    model = QualityModel(build_tiny("mixtral", tmp_path / "tiny"))
    logged = calibrate(model, torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(1)))

    def error(layers: dict[int, CompressedLayer]) -> float:
        return sum(
            logged[layer].relative_output_error(model.source(layer), made.experts) for layer, made in layers.items()
        )

    by_layer, by_expert = (spend_alone(model, logged, 2.5, by_expert=each) for each in (False, True))
    even = {layer: EVEN_CODES[5].method(model.source(layer), logged[layer], random.Random(0)) for layer in logged}
    assert mean_bits(by_layer) <= mean_bits(even) + 1e-6
    assert mean_bits(by_expert) <= mean_bits(even) + 1e-6
    assert error(by_expert) < error(by_layer)
