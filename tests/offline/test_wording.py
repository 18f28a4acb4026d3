"""Sizes and durations as a person reads them."""

import pytest

from vllm_puzzle.offline.wording import duration, size


@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (276_480, "276 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (12_345_678, "12.3 MB"),
        (57_982_058_496, "58.0 GB"),
        (1_340_000_000_000, "1.34 TB"),
        (5_000_000_000_000_000, "5000 TB"),
    ],
)
def test_size(num_bytes: int, said: str) -> None:
    assert size(num_bytes) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "0 seconds"),
        (1.2, "1 second"),
        (89, "89 seconds"),
        (90, "2 minutes"),
        (5399, "90 minutes"),
        (5400, "1.5 hours"),
        (1616 * 60, "27 hours"),
        (528 * 60, "8.8 hours"),
        (48 * 3600, "2.0 days"),
        (20 * 86400, "20 days"),
    ],
)
def test_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said
