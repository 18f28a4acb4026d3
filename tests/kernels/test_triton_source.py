"""What older versions of Triton ask of the kernels' source; `benchmarks.triton_versions` compiles with them."""

import ast
from pathlib import Path

import pytest

from vllm_puzzle.kernels import triton

MODULES = sorted(Path(triton.__file__).parent.glob("*.py"))


def functions(module: Path) -> list[ast.FunctionDef]:
    """Those that Triton compiles."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [function for function in found if any("jit" in ast.unparse(mark) for mark in function.decorator_list)]


COMPILED = {function.name for module in MODULES for function in functions(module)}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_an_attribute_of_a_constexpr_has_a_name_before_it_is_passed(module: Path) -> None:
    """To Triton 3.6 `TILE.decoder` is no constexpr where a kernel's function takes it as an argument."""
    passed = []
    for function in functions(module):
        constants = {argument.arg for argument in function.args.args if argument.annotation is not None}
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in COMPILED:
                given = [*call.args, *(keyword.value for keyword in call.keywords)]
                read = (node for argument in given for node in ast.walk(argument) if isinstance(node, ast.Attribute))
                passed += [ast.unparse(node) for node in read if ast.unparse(node.value) in constants]
    assert not passed


def test_the_kernels_are_found() -> None:
    assert {"gate_up_kernel", "_multiply_both", "decode", "combine_kernel", "place_kernel"} <= COMPILED
