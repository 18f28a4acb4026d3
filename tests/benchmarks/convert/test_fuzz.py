"""Damaged sources: a typed error or a whole result, never anything in between."""

from pathlib import Path

from benchmarks.convert.fuzz import fuzz


def test_damaged_headers_and_indices(tmp_path: Path) -> None:
    result = fuzz(tmp_path, 150, seed=5)
    assert result["untyped"] == []
    assert result["left_behind"] == []
    # The seed decides what is damaged. What converts is damaged where nothing reads, such as in a key of the header's
    # metadata.
    assert (result["refused"], result["converted"]) == (127, 23)
