"""Packed checkpoints and their unpacked twins, made once a session for every family that vLLM serves on a CPU."""

from pathlib import Path
from shutil import copytree

import pytest

from tests.plugin.checkpoints import TEXT, pack_and_unpack
from tests.plugin.engine import SERVED
from tests.tiny import build_tiny


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


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A copy of `packed` to spoil."""
    return copytree(packed, tmp_path / "copy")
