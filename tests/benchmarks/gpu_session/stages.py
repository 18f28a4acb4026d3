"""Stages made of a few lines of Python, and the lines that a session keeps of them."""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_session.session import Stage

Row = dict[str, Any]


def lines(out: Path) -> list[Row]:
    return [json.loads(line) for line in (out / "session.jsonl").read_text().splitlines()]


def stage(name: str, script: str, limit: float = 60) -> Stage:
    return Stage(name, [sys.executable, "-c", script], limit)


def say(**fields: Any) -> str:
    return f"print({json.dumps(fields)!r}, flush=True);"
