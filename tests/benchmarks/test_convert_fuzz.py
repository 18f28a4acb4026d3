"""Damaged sources: a typed error or a whole result, never anything in between."""

from pathlib import Path

from benchmarks.convert.fuzz import fuzz


def test_damaged_headers_and_indices(tmp_path: Path) -> None:
    result = fuzz(tmp_path, 150, seed=5)
    assert result["untyped"] == []
    assert result["left_behind"] == []
    # Some damages change nothing that matters, such as the case of a name that nothing reads.
    refused, converted = int(str(result["refused"])), int(str(result["converted"]))
    assert refused + converted == 150
    assert min(refused, converted) > 0
