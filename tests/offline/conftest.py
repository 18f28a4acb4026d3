"""A checkpoint and a text to calibrate on, and one speed of the machine: it decides which rule is the default."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.offline.planning import SPEED
from tests.tiny import build_tiny, short_text
from vllm_puzzle.offline.conversion.estimate import Speed


@pytest.fixture(scope="module", autouse=True)
def known_speed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Speed, "measure", lambda device: SPEED)
        yield


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build_tiny("mixtral", tmp_path / "source")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text(short_text(60))
    return path
