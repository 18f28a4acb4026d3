"""What benchmarks hand to processes of their own."""

import ast
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*/__main__.py")), ids=lambda script: script.parent.name)
def test_a_spawned_process_finds_what_it_is_to_call(script: Path) -> None:
    """It does not import the `__main__` of a package again, so nothing that is defined there."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    handed = {
        argument.id
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in ("map", "submit")
        for argument in call.args[:1]
        if isinstance(argument, ast.Name)
    }
    assert not handed & defined
