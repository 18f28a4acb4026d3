"""The benchmark of one MoE layer: its peers compute the same experts, and its rows say what it measured."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from benchmarks.cpu_moe.peers import has_quantized
from benchmarks.cpu_moe.rows import Limits, Load, build_layers, check_agreement, measure
from vllm_puzzle.tuning.shape import LayerShape

SHAPE = LayerShape("small", num_experts=8, hidden_size=256, intermediate_size=128, top_k=2)


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_engines_agree_and_rows_are_complete() -> None:
    torch.manual_seed(0)
    layers, missing = build_layers(SHAPE, rotated_bytes=1_000_000)
    assert len(layers) == 2
    assert any("zentorch" in sentence for sentence in missing) == (find_spec("zentorch") is None)
    assert any("FP8" in sentence for sentence in missing) != has_quantized()
    for engines in layers:
        differences = check_agreement(SHAPE, engines)
        bounds = {"bf16": 0.01, "bf16_vec": 0.01, "bf16_amx": 0.01, "fp8": 0.1, "int8": 0.1, "int4": 0.4}
        quantized = {"fp8", "int8", "int4"} if has_quantized() else set()
        vllms = {name: value for name, value in differences.items() if not name.startswith("zentorch_")}
        assert {"bf16_vec"} | quantized == set(vllms) - {"bf16_amx"} <= set(bounds)
        # Each format's own rounding, neither nothing nor another function.
        assert all(value < bounds[name.removeprefix("zentorch_")] for name, value in differences.items())
        assert all(differences[name] > 0.01 for name in quantized)
    # A CPU without BF16 instructions multiplies large matrices of it for seconds.
    rows = measure(SHAPE, layers, Load(1, "mates"), 2, Limits(gemm_size=64))
    ours = rows[0]
    assert ours["engine"].startswith("cpu-")
    activations = 2 * SHAPE.hidden_size * 2
    # Mates share one slot: half the bytes of their two BF16 experts.
    assert ours["bytes_moved"] == 2 * SHAPE.expert_elements + activations
    bf16 = next(row for row in rows if row["engine"] == "bf16_vec")
    assert bf16["bytes_moved"] == 4 * SHAPE.expert_elements + activations
    assert max(row["ratio_vs_bf16"] for row in rows if "bf16" in row["engine"]) == 1
    coded = next(row for row in rows if row["engine"] == "coded_3")
    # Both mates are read, 3 bits a weight.
    assert coded["bytes_moved"] == 2 * 3 / 8 * SHAPE.expert_elements + activations
    # Both are rounded.
    assert ours["gb_per_s"] == pytest.approx(ours["bytes_moved"] / ours["ms_median"] / 1e6, abs=0.01)
