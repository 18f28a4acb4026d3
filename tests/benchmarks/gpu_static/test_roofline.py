"""The roofline model against enumeration and against sums done by hand. Nothing is timed."""

from dataclasses import replace
from itertools import combinations, pairwise, product
from math import ceil

import pytest

from benchmarks.gpu_static.devices import DEVICES, Device
from benchmarks.gpu_static.roofline import (
    ASSUMPTIONS,
    MEMORY_EFFICIENCY,
    NUM_TOKENS,
    TENSOR_EFFICIENCY,
    Bound,
    Costs,
    Instructions,
    Tile,
    expected_row_tiles,
    expected_slots,
    markdown,
    predict,
    predictions,
)
from benchmarks.shapes import GPU_SHAPES, QWEN3_30B_A3B
from vllm_puzzle.tuning.shape import LayerShape

COSTS = Costs(
    one=Instructions(alu=1.4, half=0.5, issued=3.2), both=Instructions(alu=2.5, half=1.0, issued=5.1), bf16_issued=1.5
)
# One of everything, and so fast at everything that what a test slows down is the bound.
UNIT = Device("unit", 90, 1, 1.0, 1e9, 1e6, alu_lanes=10**6, half_lanes=10**6, schedulers=10**6, warp_size=32)
# Both experts of its only slot run for every token; 3 * 4 * 8 = 96 words.
PAIR = LayerShape("pair", num_experts=2, hidden_size=4, intermediate_size=8, top_k=2)


BOTH_MEMBERS = Tile(members=2, tokens=16)
ONE_MEMBER = Tile(members=1, tokens=16)


@pytest.mark.parametrize(("top_k", "num_tokens"), [(1, 1), (1, 3), (2, 1), (2, 2), (2, 3), (3, 2), (4, 2)])
def test_random_routing_equals_its_enumeration(top_k: int, num_tokens: int) -> None:
    shape = LayerShape("small", 4, 8, 8, top_k)
    outcomes = list(product(combinations(range(4), top_k), repeat=num_tokens))
    active = one = both = tiles = 0
    for outcome in outcomes:
        rows = [sum(expert in chosen for chosen in outcome) for expert in range(4)]
        slots = [(rows[0] > 0) + (rows[1] > 0), (rows[2] > 0) + (rows[3] > 0)]
        active, one, both = active + sum(slots), one + slots.count(1), both + slots.count(2)
        tiles += sum(ceil(count / 2) for count in rows)
    occupancy = expected_slots(shape, num_tokens)
    assert occupancy == pytest.approx([total / len(outcomes) for total in (active, one, both)])
    assert 4 * expected_row_tiles(shape, num_tokens, 2) == pytest.approx(tiles / len(outcomes))


def test_occupancy_at_its_limits() -> None:
    assert expected_slots(LayerShape("one choice", 8, 8, 8, 1), 1) == pytest.approx((1, 1, 0))
    assert expected_slots(QWEN3_30B_A3B, 10_000) == pytest.approx((128, 0, 64))


def test_row_tiles_of_many_tokens() -> None:
    rows = 20_000 * 8 / 128
    assert rows / 64 < expected_row_tiles(QWEN3_30B_A3B, 20_000, 64) < rows / 64 + 1
    assert expected_row_tiles(QWEN3_30B_A3B, 20_000, 1) == pytest.approx(rows)


def test_bytes_by_hand() -> None:
    # A token: 4 in, 4 out, and for each of its two choices 8 inner and 4 outer values, written and read.
    activations = 2 * (4 + 4 + 2 * 2 * (8 + 4))
    packed = predict(UNIT, PAIR, 2, BOTH_MEMBERS, COSTS)
    assert (packed.bytes_packed, packed.bytes_bf16) == (2 * (96 + activations), 2 * (2 * 96 + activations))
    assert predict(UNIT, PAIR, 2, ONE_MEMBER, COSTS).bytes_packed == packed.bytes_packed
    alone = predict(UNIT, replace(PAIR, top_k=1), 1, BOTH_MEMBERS, COSTS)
    assert alone.bytes_packed == alone.bytes_bf16 == 2 * (96 + 4 + 4 + 2 * (8 + 4))


def test_memory_bound_speedup_is_the_byte_ratio() -> None:
    prediction = predict(replace(UNIT, hbm_gb_per_s=1), PAIR, 2, BOTH_MEMBERS, COSTS, num_kernels=0)
    assert prediction.bound == "memory"
    assert prediction.microseconds == pytest.approx(prediction.bytes_packed / 1e3 / MEMORY_EFFICIENCY)
    assert prediction.speedup == pytest.approx(prediction.bytes_bf16 / prediction.bytes_packed)


@pytest.mark.parametrize(
    ("bound", "device", "packed", "bf16"),
    [
        ("alu", replace(UNIT, alu_lanes=1), 96 * 2.5, 0),
        ("half", replace(UNIT, half_lanes=1), 96 * 1.0, 0),
        ("issue", replace(UNIT, schedulers=1), 96 * 5.1 / 32, 96 * 2 * 1.5 / 32),
        # 16 rows for either member although there is one token; 1e-3 TFLOPS is a flop a clock.
        ("tensor", replace(UNIT, bf16_tflops=1e-3), *[2 * 96 * 2 * 16 / TENSOR_EFFICIENCY] * 2),
    ],
)
def test_what_is_slowed_down_is_the_bound(bound: Bound, device: Device, packed: float, bf16: float) -> None:
    prediction = predict(device, PAIR, 1, BOTH_MEMBERS, COSTS, num_kernels=0)
    assert prediction.bound == bound
    assert prediction.microseconds == pytest.approx(packed / 1e3)
    assert prediction.microseconds_bf16 == pytest.approx(bf16 / 1e3, abs=1e-5)
    alone = predict(device, replace(PAIR, top_k=1), 1, BOTH_MEMBERS, COSTS, num_kernels=0)
    fraction = {"alu": 1.4 / 2.5, "half": 0.5 / 1.0, "issue": 3.2 / 5.1, "tensor": 0.5}[bound]
    assert alone.microseconds == pytest.approx(fraction * prediction.microseconds)
    slower = predict(device, PAIR, 1, BOTH_MEMBERS, COSTS, num_kernels=3)
    assert slower.microseconds == pytest.approx(prediction.microseconds + 6)


def test_every_row_tile_decodes_again() -> None:
    # 40 rows a member are three tiles of 16: six programs of one member, or one of both and four of one.
    assert predict(UNIT, PAIR, 40, ONE_MEMBER, COSTS).issue_slots == pytest.approx(96 * 6 * 3.2 / 32)
    assert predict(UNIT, replace(PAIR, top_k=1), 1, BOTH_MEMBERS, COSTS).issue_slots == pytest.approx(96 * 3.2 / 32)
    assert predict(UNIT, PAIR, 40, BOTH_MEMBERS, COSTS).issue_slots == pytest.approx(96 * (5.1 + 4 * 3.2) / 32)


@pytest.mark.parametrize("shape", GPU_SHAPES, ids=lambda shape: shape.name)
def test_more_tokens_are_more_work(shape: LayerShape) -> None:
    for device in DEVICES:
        row = [predict(device, shape, num_tokens, BOTH_MEMBERS, COSTS) for num_tokens in NUM_TOKENS]
        for fewer, more in pairwise(row):
            assert fewer.active_slots <= more.active_slots <= shape.num_experts / 2
            assert fewer.bytes_packed < more.bytes_packed < more.bytes_bf16 < 2 * more.bytes_packed
            assert fewer.microseconds < more.microseconds
            assert fewer.issue_slots < more.issue_slots


def test_markdown_says_that_it_is_a_model_and_shows_everything() -> None:
    tiles = iter([BOTH_MEMBERS, ONE_MEMBER] * len(DEVICES) * len(GPU_SHAPES) * len(NUM_TOKENS))
    rows = predictions(lambda device, shape, num_tokens: (next(tiles), COSTS))
    assert len(rows) == len(DEVICES) * len(GPU_SHAPES) * len(NUM_TOKENS)
    text = markdown(rows)
    assert "model, not a measurement" in text.splitlines()[0]
    assert all(f"- {sentence}\n" in text for sentence in ASSUMPTIONS)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == len(GPU_SHAPES) * (2 + len(NUM_TOKENS))
    assert {line.count("|") for line in table} == {5 + len(DEVICES)}
    for row in rows:
        assert f"| {row.microseconds:,.1f} ({row.speedup:.2f}x" in text
