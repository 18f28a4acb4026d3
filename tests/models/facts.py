"""vllm_classes.json: what tests/models/vllm_sources.py found, written down.

`python -m tests.models.facts` writes it again, for another vLLM.
"""

import json
from dataclasses import asdict
from pathlib import Path

from tests.models.vllm_sources import FROM_CONFIG, Sources, moe_classes

_PATH = Path(__file__).with_name("vllm_classes.json")
# What the factory takes where the class says nothing.
_FACTORY_NAMES = "gate_proj, down_proj, up_proj"


def recorded() -> dict[str, Sources]:
    """The classes by their architecture, as written down."""
    return {name: Sources(**values) for name, values in json.loads(_PATH.read_text()).items()}


def holds_any_text_model(sources: Sources) -> bool:
    """Whether experts are there only if the config of a multimodal class names a text model that has them."""
    return FROM_CONFIG in sources.inner and not sources.builds and not sources.calls_operator


def experts_on_disk(sources: Sources) -> str:
    """The names of experts as vLLM's class expects them, below a layer; "not seen" for what no constant says."""
    if not sources.builds:
        return f"as in {', '.join(sources.inner)}" if sources.inner else "not seen"
    block = " or ".join(f"`{block}`" for block in sources.blocks) or "block not seen"
    # A class of its own for the experts may load them from tensors of any name.
    default = "not seen" if "routed_experts_cls" in sources.arguments else _in_order(_FACTORY_NAMES)
    names = [_in_order(three) for three in sources.names] or [default]
    return f"{block}: {'; '.join(names)}"


def _in_order(names: str) -> str:
    gate, down, up = names.split(", ")
    # A model without a gate gives the name of up in its place.
    return ", ".join(f"`{name}`" for name in (gate, up, down) if name != "None")


def _write() -> None:
    lines = [f" {json.dumps(name)}: {json.dumps(_filled(sources))}" for name, sources in moe_classes().items()]
    _PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _filled(sources: Sources) -> dict[str, object]:
    return {name: value for name, value in asdict(sources).items() if value}


if __name__ == "__main__":
    _write()
