"""Compiling under other versions of Triton: what is told of each."""

import sys
from pathlib import Path

import pytest

from benchmarks.triton_versions import Report, compile_with, main, summarize, table_line

ROW = {"misses": [], "registers": 96, "spill_bytes": 0}
OTHER = {"target": "sm90", "kernel": "place", "registers": 168, "spill_bytes": 0}


def test_a_version_that_compiles_within_its_budgets() -> None:
    report = summarize("3.7.1", {"rows": [ROW, {**ROW, "registers": 239}], "other_kernels": [OTHER]})
    assert report.passed
    assert table_line(report) == "| 3.7.1 | 2 | 0 | 1 | 0 | 239 | 0 |"


def test_what_misses_a_budget_or_spills_is_counted() -> None:
    missed = summarize("3.8.0", {"rows": [ROW, {**ROW, "misses": ["spills"], "spill_bytes": 8}], "other_kernels": []})
    assert not missed.passed
    assert table_line(missed) == "| 3.8.0 | 2 | 1 | 0 | 0 | 96 | 8 |"
    assert not summarize("3.8.0", {"rows": [ROW], "other_kernels": [{**OTHER, "spill_bytes": 4}]}).passed


def test_a_version_that_does_not_compile_is_told(tmp_path: Path) -> None:
    """The folder's Triton comes before the one that is installed."""
    package = tmp_path / "triton"
    package.mkdir()
    (package / "__init__.py").write_text('raise RuntimeError("no compiler in here")\n', encoding="utf-8")
    report = compile_with("3.0.0", tmp_path, ["sm90"])
    assert report == Report("3.0.0", "not everything compiles: RuntimeError: no compiler in here")
    assert not report.passed
    assert table_line(report) == "| 3.0.0 | not everything compiles: RuntimeError: no compiler in here |"


def test_a_version_that_cannot_be_had_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(sys, "argv", ["triton_versions", "0.0.1"])
    assert main() == 1
    assert "| 0.0.1 | pip cannot install it: ERROR: No matching distribution found" in capsys.readouterr().out
