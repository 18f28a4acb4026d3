"""Packed checkpoints and their unpacked twins, made once a session for every family that vLLM serves on a CPU."""

from pathlib import Path

import pytest

from tests.plugin.engine import SERVED
from tests.tiny import build_tiny
from vllm_puzzle.cli import main

TEXT = "".join(f"{i * i % 977} apples, {i % 89} pears and the {i % 13}th of May; " for i in range(200))


def pack_and_unpack(source: Path, folder: Path, text: str) -> tuple[Path, Path]:
    """Converts `source` at 50 % and unpacks the result; returns both folders."""
    calibration = folder / "text.txt"
    calibration.write_text(text)
    packed, unpacked = folder / "packed", folder / "unpacked"
    # The fastest rule: what words say is the same whichever rule wrote them.
    options = ["--calibration", str(calibration), "--rule", "paper"]
    assert main(["convert", str(source), str(packed), *options]) == 0
    assert main(["unpack", str(packed), str(unpacked)]) == 0
    return packed, unpacked


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By family: (packed, unpacked)."""
    made = {}
    for family, overrides in SERVED.items():
        folder = tmp_path_factory.mktemp(family)
        source = build_tiny(family, folder / "source", **overrides)
        made[family] = pack_and_unpack(source, folder, TEXT)
    return made


@pytest.fixture(scope="session")
def packed(checkpoints: dict[str, tuple[Path, Path]]) -> Path:
    """A packed tiny Mixtral; tests that change it work on a copy."""
    return checkpoints["mixtral"][0]
