"""What a session says at its end, and what it counts as a failure."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_session.correctness import check_all
from benchmarks.gpu_session.fake_card import FakeCard
from benchmarks.gpu_session.session import Session
from benchmarks.gpu_session.summary import failures, summary
from benchmarks.gpu_session.workload import FAKE
from tests.benchmarks.gpu_session.stages import Row, say, stage
from vllm_puzzle.kernels.triton.moe import triton_moe
from vllm_puzzle.kernels.triton.target import INTERPRETED
from vllm_puzzle.tuning.shape import LayerShape


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")
def test_a_wrong_result_is_reported(tmp_path: Path) -> None:
    """From the check that finds it to the summary: a kernel that forgets a token, and one that does not repeat."""
    rows: list[Row] = []
    turns = []

    def wrong(*arguments: Any) -> torch.Tensor:
        output = triton_moe(*arguments)
        turns.append(None)
        if len(output) and len(turns) % 2:
            output[-1] = 0
        return output

    workload = LayerShape("even", num_experts=6, hidden_size=32, intermediate_size=16, top_k=2)
    small = type(FAKE)(**{**FAKE.__dict__, "checked": (workload,), "checked_tokens": (0, 1), "keys": 1})
    check_all(FakeCard(), small, lambda **row: rows.append(row), wrong)
    assert {row["ok"] for row in rows if row["tokens"] == 0} == {True}
    assert {row["ok"] for row in rows if row["tokens"] == 1} == {False}
    assert not any(row["repeats"] for row in rows if row["tokens"] == 1)
    with Session(tmp_path, 60) as session:
        session.run(stage("correct", "".join(say(**row) for row in rows)))
    assert len(failures(session.rows)) == sum(not row["ok"] for row in rows)
    text = summary(session.rows)
    assert f"- correct: {len(rows) // 2} of {len(rows)} right" in text
    assert "**WRONG**" in text
    assert "tokens 1" in text


def test_what_is_right_is_no_failure() -> None:
    rows = [
        {"what": "ceilings", "read_gb_per_s": 3000.0, "bf16_tflops": 600.0},
        {"what": "time", "shape": "Qwen", "tokens": 16, "routing": "random", "engine": "vllm_bf16", "ok": True}
        | {"us": 300.0, "gb_per_s": 2400.0, "tflops": 6.0, "ratio_vs_vllm_bf16": 1.0},
        {"what": "time", "shape": "Qwen", "tokens": 16, "routing": "random", "engine": "packed", "ok": True}
        | {"us": 200.0, "gb_per_s": 2100.0, "tflops": 9.0, "ratio_vs_vllm_bf16": 1.5},
        {"what": "time", "shape": "Qwen", "tokens": 16, "routing": "random", "engine": "vllm_fp8", "error": "none"},
        {"what": "tuned", "tokens": 16, "us": 150.0, "us_before": 200.0, "measured": 9, "failed": 1, "ok": True}
        | {"finished": False},
        {"what": "stage", "stage": "times", "status": 0, "seconds": 12.0, "ended": "by itself"},
        {"what": "stage", "stage": "compile", "status": -9, "seconds": 99.0, "ended": "when no longer needed"},
    ]
    assert failures(rows) == []
    text = summary(rows)
    assert "| 16 | random | 300.0 µs, 2,400 GB/s (80%), 6 TF (1%), 1.00x | 200.0 µs, 2,100 GB/s (70%), 9 TF (2%), 1.50x |" in text  # fmt: skip # noqa: E501
    assert "| error |" in text
    assert "| 16 | 200.0 | 150.0 | 9 measured, 1 did not run, out of time |" in text
    assert "WRONG" not in text
