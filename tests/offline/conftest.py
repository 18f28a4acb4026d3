"""The speed of the machine decides which rule is the default, so every test here has the same one."""

from collections.abc import Iterator

import pytest

from vllm_puzzle.offline.estimate import Speed


@pytest.fixture(scope="module", autouse=True)
def known_speed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_puzzle.offline.convert.measure_speed", lambda device: Speed(products=1e11, elements=1e9))
        yield
