"""What vLLM's source says of the model classes of its registry that build routed experts.

Nothing of vLLM is imported or run: its files are parsed, and a class is followed to whatever else it names. What the
program does not see stays empty.
"""

import ast
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

from tests.models.parsed import Definition, Used, last_name, parsed, used_by, vllm_root

# The dictionaries of the registry. Draft models are left out: the converter copies their layers as they are.
_DICTIONARIES = (
    "_TEXT_GENERATION_MODELS",
    "_EMBEDDING_MODELS",
    "_LATE_INTERACTION_MODELS",
    "_REWARD_MODELS",
    "_TOKEN_CLASSIFICATION_MODELS",
    "_SEQUENCE_CLASSIFICATION_MODELS",
    "_MULTIMODAL_MODELS",
    "_TRANSFORMERS_SUPPORTED_MODELS",
    "_TRANSFORMERS_BACKEND_MODELS",
)
_FACTORY = "FusedMoEFactory"
# What a class calls that computes experts beside the layers that vLLM quantizes.
_OPERATOR = "fused_experts"
_MAPPINGS = ("fused_moe_make_expert_params_mapping", "get_expert_mapping", "make_expert_params_mapping")
_INNER_MODEL = "init_vllm_registered_model"
FROM_CONFIG = "the config's"

# Arguments of the factory that say which experts they are; the rest are sizes and plumbing.
_TELLING = (
    "activation",
    "apply_router_weight_on_input",
    "custom_routing_function",
    "has_bias",
    "is_fused_checkpoint_transposed",
    "routed_input_transform",
    "routed_experts_cls",
    "scoring_func",
    "shared_experts",
    "swiglu_alpha",
    "swiglu_limit",
    "zero_expert_type",
)
_NESTED = ("text_config", "thinker_config", "llm_config", "language_config", "get_text_config")


@dataclass
class Sources:
    """An architecture of the registry, and what the source of its class says."""

    module: str
    class_name: str
    builds: bool = False
    # Whether it computes experts by itself, where a quantization does not reach them.
    calls_operator: bool = False
    # What the factory is given beside sizes: of each argument all values that occur, as they are written.
    arguments: dict[str, list[str]] = field(default_factory=dict)
    # The names on disk of gate, down and up, by every mapping and factory that the class reaches.
    names: list[str] = field(default_factory=list)
    # What holds the experts in a layer.
    blocks: list[str] = field(default_factory=list)
    # Beginnings and parts of names on disk, and what they become.
    renames: dict[str, str] = field(default_factory=dict)
    # Where in the config the text model's may lie.
    nested: list[str] = field(default_factory=list)
    # The architectures of the text models that a multimodal class holds, or FROM_CONFIG.
    inner: list[str] = field(default_factory=list)


@cache
def registered() -> dict[str, tuple[str, str]]:
    """Of every architecture of the registry, the module and the name of its class."""
    tree = ast.parse((vllm_root() / "model_executor/models/registry.py").read_text())
    found: dict[str, tuple[str, str]] = {}
    for node in tree.body:
        if not (isinstance(node, ast.Assign) and last_name(node.targets[0]) in _DICTIONARIES):
            continue
        assert isinstance(node.value, ast.Dict)
        for key, value in zip(node.value.keys, node.value.values, strict=True):
            if isinstance(key, ast.Constant):
                module, name = ast.literal_eval(value)
                found[key.value] = (
                    module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}",
                    name,
                )
    return found


@cache
def moe_classes() -> dict[str, Sources]:
    """The architectures whose classes build routed experts, themselves or in the text model that they hold."""
    found = {name: _read(name) for name in sorted(registered())}
    return {name: sources for name, sources in found.items() if _ends_in_experts(sources)}


def _ends_in_experts(sources: Sources) -> bool:
    inside = any(_ends_in_experts(_read(name)) for name in sources.inner if name in registered())
    return sources.builds or sources.calls_operator or inside or FROM_CONFIG in sources.inner


@cache
def _read(architecture: str) -> Sources:
    sources = Sources(*registered()[architecture])
    # The class itself comes first, so that what it renames counts before what its parts do.
    for module, definition in _follow((sources.module, sources.class_name), lambda each: used_by(each).names):
        _add(sources, module, definition, used_by(definition))
    return sources


def _follow(start: tuple[str, str], further: Callable[[Definition], Iterable[str]]) -> Iterator[tuple[str, Definition]]:
    """Every definition behind a (module, name) and, in turn, behind the names that `further` takes from it."""
    waiting, seen = deque([start]), set()
    while waiting:
        where = waiting.popleft()
        home = parsed(where[0]) if where not in seen else None
        seen.add(where)
        if home is None:
            continue
        waiting.extend(home.imports.get(where[1], ()))
        for definition in home.definitions.get(where[1], ()):
            waiting.extend((home.name, name) for name in further(definition))
            yield home.name, definition


def _add(sources: Sources, module: str, definition: Definition, used: Used) -> None:
    for call in used.calls:
        name = last_name(call.func)
        if name == _FACTORY:
            sources.builds = True
            _add_arguments(sources, call)
        elif name == _OPERATOR:
            sources.calls_operator = True
        elif name in _MAPPINGS:
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            _add_names(sources, [given.get(f"ckpt_{part}_proj_name") for part in ("gate", "down", "up")])
        elif name == _INNER_MODEL:
            _extend(sources.inner, _architectures(call, definition))
    blocks = [name for name, call in used.submodules if _builds_itself(module, last_name(call.func))]
    _extend(sources.blocks, blocks)
    _extend(sources.nested, [name for name in _NESTED if name in used.attributes])
    for mapping in used.renames:
        for key, value in zip(mapping.keys, mapping.values, strict=True):
            if isinstance(key, ast.Constant):
                sources.renames.setdefault(key.value, ast.unparse(value).strip("'"))


def _extend(values: list[str], more: list[str]) -> None:
    values.extend(new for new in more if new not in values)


def _add_arguments(sources: Sources, call: ast.Call) -> None:
    for keyword in call.keywords:
        if keyword.arg == "ckpt_names" and isinstance(keyword.value, ast.Tuple):
            _add_names(sources, list(keyword.value.elts))
        elif keyword.arg in _TELLING:
            _extend(sources.arguments.setdefault(keyword.arg, []), [ast.unparse(keyword.value)])


def _add_names(sources: Sources, parts: list[ast.expr | None]) -> None:
    constants = [part.value for part in parts if isinstance(part, ast.Constant)]
    if len(constants) == 3:
        _extend(sources.names, [", ".join(map(str, constants))])


@cache
def _builds_itself(module: str, name: str) -> bool:
    """Whether a class, or one that it inherits, calls the factory."""

    def bases(definition: Definition) -> list[str]:
        return [last_name(base) for base in definition.bases] if isinstance(definition, ast.ClassDef) else []

    return any(
        isinstance(definition, ast.ClassDef)
        and any(last_name(call.func) == _FACTORY for call in used_by(definition).calls)
        for _, definition in _follow((module, name), bases)
    )


def _architectures(call: ast.Call, definition: Definition) -> list[str]:
    """The constants of `architectures=[...]`, or of the variable that is given; else FROM_CONFIG."""
    value = next((keyword.value for keyword in call.keywords if keyword.arg == "architectures"), None)
    places: list[ast.expr] = [value] if isinstance(value, ast.List) else []
    if isinstance(value, ast.Name):
        assigned = [node for node in ast.walk(definition) if isinstance(node, ast.Assign)]
        places = [node.value for node in assigned if last_name(node.targets[0]) == value.id]
    constants = [node.value for place in places for node in ast.walk(place) if isinstance(node, ast.Constant)]
    return [constant for constant in constants if isinstance(constant, str)] or [FROM_CONFIG]
