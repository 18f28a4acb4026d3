"""Sizes, durations and names as a person reads them."""

import os
from pathlib import Path

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def size(num_bytes: float) -> str:
    """A number of bytes in three digits and a unit of 1000s, as `58.0 GB`."""
    value, unit = float(num_bytes), 0
    # As it will be printed: 999.6 kB is 1.00 MB.
    while float(f"{value:.3g}") >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    if unit == 0:
        return f"{value:.0f} {_UNITS[0]}"
    return f"{value:.{max(0, 2 - _places(value))}f} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """A time in the unit that takes few digits, as `40 seconds`, `27 hours`, `2.4 days`."""
    if seconds < 90:
        return "1 second" if round(seconds) == 1 else f"{seconds:.0f} seconds"
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 90:
        return f"{minutes:.0f} minutes"
    if hours < 48:
        return f"{_short(hours)} hours"
    return f"{_short(hours / 24)} days"


def readable(path: Path | str) -> str:
    """A path for a text in UTF-8, whatever bytes the file system has; not to open it by."""
    return os.fsencode(path).decode("utf-8", "replace")


def label(path: Path) -> str:
    """The last part of a path, for a text in UTF-8."""
    return readable(path.name)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def _places(value: float) -> int:
    """The number of digits before the point, less one."""
    return len(str(int(float(f"{value:.3g}")))) - 1
