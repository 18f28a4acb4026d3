"""Packed checkpoints and their unpacked twins, made once a session."""

from pathlib import Path
from shutil import copytree

import pytest

from tests.plugin.checkpoints import Checkpoints
from tests.plugin.engine import Answers


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory)


@pytest.fixture(scope="session")
def answers() -> Answers:
    return Answers()


@pytest.fixture(scope="session")
def packed(checkpoints: Checkpoints) -> Path:
    """A packed tiny Mixtral; tests that change it work on a copy."""
    return checkpoints["mixtral"][0]


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A copy of `packed` to spoil."""
    return copytree(packed, tmp_path / "copy")


@pytest.fixture
def mixed_copy(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A copy of a tiny Mixtral with pairs in layer 0, codes in layer 1 and plain experts in layer 2, to spoil."""
    return copytree(checkpoints.mixed("mixtral")[0], tmp_path / "mixed_copy")
