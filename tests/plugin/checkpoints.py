"""Packed checkpoints and their unpacked twins."""

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


class Checkpoints:
    """(packed, unpacked) of each family that vLLM serves on a CPU, made when it is first asked for.

    Making all of them takes a minute, and most files of tests need one.
    """

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._made: dict[str, tuple[Path, Path]] = {}

    def __getitem__(self, family: str) -> tuple[Path, Path]:
        if family not in self._made:
            folder = self._folders.mktemp(family)
            source = build_tiny(family, folder / "source", **SERVED[family])
            self._made[family] = pack_and_unpack(source, folder, TEXT)
        return self._made[family]
