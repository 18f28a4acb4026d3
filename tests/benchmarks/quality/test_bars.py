"""What the bars say of rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.bars import PAIRS, bars, main


def row(model: str, method: str, bits: float, value: float) -> dict[str, Any]:
    figures = ("output_error", "perplexity", "kl_divergence", "kl_with_source_routing")
    return {"model": model, "method": method, "bits_per_expert_weight": bits, **dict.fromkeys(figures, value)}


def test_a_row_that_loses_more_than_it_may_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [row("sparse", PAIRS, 8, 1.0), row("sparse", PAIRS, 14, 0.1)]
    (tmp_path / "good.json").write_text(json.dumps({"rows": [*pairs, row("sparse", "codes, 3 bits", 3.1, 0.9)]}))
    (tmp_path / "bad.json").write_text(json.dumps({"rows": [row("sparse", "codes, 3 bits", 3.1, 1.1)]}))
    assert main([str(tmp_path / "good.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(bars()))
    assert sum(line.endswith(": met") for line in lines) == 3
    assert sum(line.endswith(": missing") for line in lines) == len(lines) - 3
    # The later file's row counts.
    assert main([str(tmp_path / "good.json"), str(tmp_path / "bad.json")]) == 1
    assert "1.1 / 1 = 1.100, at most 1: MISSED" in capsys.readouterr().out
