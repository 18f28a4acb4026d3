"""Every class of vLLM that ends in routed experts is spoken of, and docs/models.md says the same."""

import ast
from pathlib import Path

import pytest

from tests import tiny
from tests.models.facts import holds_any_text_model, recorded
from tests.models.page import PATH, page
from tests.models.statuses import FAMILIES, STATUSES
from tests.models.test_tiny_models import CONVERTED
from tests.models.tiny_models import architecture as architecture_of
from tests.models.vllm_sources import moe_classes
from vllm_puzzle.offline.checkpoints.architectures import ARCHITECTURES, REFUSED

_ENGINES = Path(__file__).parents[1] / "plugin" / "engine.py"


@pytest.mark.heavy
def test_what_is_written_down_is_what_the_installed_vllm_says() -> None:
    installed, written = moe_classes(), recorded()
    assert sorted(installed) == sorted(written)
    for architecture, sources in installed.items():
        assert sources == written[architecture], f"{architecture}: run python -m tests.models.facts"


def test_every_class_has_a_status_or_holds_whatever_its_config_names() -> None:
    spoken_for = {name for name, sources in recorded().items() if not holds_any_text_model(sources)}
    assert set(STATUSES) - set(recorded()) == set()
    assert spoken_for - set(STATUSES) == set()


def test_statuses_are_whole() -> None:
    for architecture, status in STATUSES.items():
        assert status.word in ("tested", "converts", "not yet", "refused", "dense"), architecture
        assert bool(status.why) == (status.word == "refused"), architecture
        assert bool(status.model) == (status.word in ("tested", "converts")), architecture


def test_only_what_tests_run_is_called_tested() -> None:
    """Tiny models are converted, here and in tests/offline, and those in SERVED run through vLLM."""
    declared = set(tiny.FAMILIES)
    served = _names_in("SERVED") | _names_in("UNDECLARED") | _names_in("MORE_UNDECLARED")
    for architecture, status in STATUSES.items():
        if status.model:
            assert architecture_of(status.model) == architecture
            assert (status.word == "tested") == (status.model in served), architecture
    assert {status.model for status in STATUSES.values() if status.model} == declared | set(tiny.UNDECLARED) | set(
        CONVERTED
    )
    assert {family.model for family in FAMILIES} == declared
    assert {family.model for family in FAMILIES if family.served == "tested"} == served & declared


def test_the_converter_takes_what_is_not_refused() -> None:
    assert set(recorded()) >= ARCHITECTURES
    for architecture, status in STATUSES.items():
        if status.word in ("tested", "converts", "not yet"):
            assert architecture in ARCHITECTURES - set(REFUSED)
    assert {name for name in REFUSED if STATUSES[name].word != "refused"} == set()


def _names_in(variable: str) -> set[str]:
    """The keys of a dictionary of tests/plugin/engine.py, which imports vLLM."""
    for node in ast.parse(_ENGINES.read_text()).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == variable:
            assert isinstance(node.value, ast.Dict)
            return {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
    raise AssertionError(f"{_ENGINES} has no {variable}")


def test_the_page_is_what_its_command_writes() -> None:
    assert PATH.read_text() == page(), "run python -m tests.models.page"
