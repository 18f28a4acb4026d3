"""The modules in which vLLM defines its models, parsed: what each defines, imports and uses."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# Layers, kernels and utilities are not followed.
_PACKAGES = ("vllm.model_executor.models.", "vllm.models.")
_UTILITIES = ("vllm.model_executor.models.utils", "vllm.model_executor.models.interfaces")

# Arguments of vLLM's WeightsMapper.
_RENAMES = ("orig_to_new_prefix", "orig_to_new_substr")

# An assignment is one too: some modules choose the class of a layer from a dictionary.
Definition = ast.ClassDef | ast.FunctionDef | ast.Assign


@dataclass(frozen=True)
class Parsed:
    """A module: its definitions by name, and the (module, name) behind every name that it imports."""

    name: str
    definitions: dict[str, list[Definition]] = field(default_factory=dict)
    imports: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Used:
    """What a definition's code uses; names in annotations and in questions about types do not count."""

    # In the order in which they occur.
    names: dict[str, None] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)
    calls: list[ast.Call] = field(default_factory=list)
    # What is called for the attributes of `self`: submodules, by their names.
    submodules: list[tuple[str, ast.Call]] = field(default_factory=list)
    # The dictionaries that rename beginnings and parts of tensor names.
    renames: list[ast.Dict] = field(default_factory=list)


@cache
def vllm_root() -> Path:
    """Where the installed vLLM lies; it is not imported."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@cache
def parsed(name: str) -> Parsed | None:
    """A module of vLLM's models; None for any other."""
    path = _path(name)
    if path is None or name.startswith(_UTILITIES):
        return None
    tree = ast.parse(path.read_text())
    module = Parsed(name)
    for node in _statements(tree, inside=False):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            module.definitions.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.Assign):
            module.definitions.setdefault(last_name(node.targets[0]), []).append(node)
    for node in _statements(tree, inside=True):
        if isinstance(node, ast.ImportFrom):
            source = _absolute(node, name, path.name == "__init__.py")
            for alias in node.names:
                # `from .nvidia import model`, in a package that finds its classes when they are asked for.
                inside = parsed(f"{source}.{alias.name}") if path.name == "__init__.py" else None
                for found in inside.definitions if inside else [alias.name]:
                    target = (f"{source}.{alias.name}", found) if inside else (source, alias.name)
                    module.imports.setdefault(found if inside else alias.asname or found, []).append(target)
    return module


def _path(name: str) -> Path | None:
    if not name.startswith(_PACKAGES):
        return None
    path = vllm_root().parent / name.replace(".", "/")
    found = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return found if found.is_file() else None


def _statements(node: ast.AST, inside: bool) -> Iterator[ast.AST]:
    """Those of a module, also under its conditions; `inside` of its classes and functions too."""
    for part in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, part, ()):
            yield child
            if inside or not isinstance(child, ast.ClassDef | ast.FunctionDef):
                yield from _statements(child, inside)


def _absolute(node: ast.ImportFrom, importer: str, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    parts = importer.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def last_name(node: ast.expr) -> str:
    """`c` of `a.b.c`, and a plain name itself."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


_used: dict[int, Used] = {}


def used_by(definition: Definition) -> Used:
    """Of one definition of a parsed module."""
    if id(definition) not in _used:
        used = Used()
        _collect(definition, used)
        _used[id(definition)] = used
    return _used[id(definition)]


def _collect(node: ast.AST, used: Used) -> None:
    if isinstance(node, ast.Name):
        used.names[node.id] = None
    elif isinstance(node, ast.Attribute):
        used.attributes.add(node.attr)
    elif isinstance(node, ast.Call):
        if last_name(node.func) == "isinstance":
            return
        used.calls.append(node)
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
        if isinstance(node.value, ast.Call):
            used.submodules.append((node.targets[0].attr, node.value))
    elif isinstance(node, ast.keyword) and node.arg in _RENAMES and isinstance(node.value, ast.Dict):
        used.renames.append(node.value)
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                _collect(child, used)
