"""How packed tensors are named on disk: `<experts prefix>.<first member's id>.<projection>.weight_packed`."""

import re
from collections.abc import Iterable

from .layout import FormatError
from .schema import PuzzleMoEQuantizationConfig

# The one suffix that vLLM's stock model classes route into `w13_*` / `w2_*` parameters in every family tried.
PACKED_SUFFIX = "weight_packed"

_PACKED = re.compile(rf"(?P<prefix>.+\.experts)\.(?P<expert>\d+)\.(?P<projection>\w+)\.{PACKED_SUFFIX}")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def packed_name(prefix: str, expert: int, projection: str) -> str:
    """The name of a slot's matrix, e.g. `model.layers.0.mlp.experts` + 3 + `gate_proj`."""
    return f"{prefix}.{expert}.{projection}.{PACKED_SUFFIX}"


def parse_packed_name(name: str) -> tuple[str, int, str] | None:
    """The (prefix, expert, projection) that `packed_name` was given, or None for any other tensor's name."""
    match = _PACKED.fullmatch(name)
    if match is None:
        return None
    return match["prefix"], int(match["expert"]), match["projection"]


def layer_index(name: str) -> int | None:
    """The decoder layer that a tensor or module name lies in, e.g. 3 of `model.layers.3.mlp.experts`.

    Layers for multi-token prediction count on from the decoder's; None for those under `mtp.`, which count anew.
    """
    match = None if is_outside(name) else _LAYER.search(name + ".")
    return None if match is None else int(match[1])


def is_outside(name: str) -> bool:
    """Whether a tensor or module is of a part for multi-token prediction that lies beside the model, as Qwen's."""
    return name.startswith("mtp.")


def check_packed_names(names: Iterable[str], quantization: PuzzleMoEQuantizationConfig, where: str) -> None:
    """Raises FormatError for the first expert tensor that no slot accounts for, or that a slot lacks.

    vLLM itself skips expert tensors that it cannot place, and leaves what was not loaded as it was allocated.

    Args:
        names: every tensor name of the checkpoint.
        where: what an error message calls the checkpoint.
    """
    first_members = {
        slots.layer: {slots.first_member(slot) for slot in range(slots.num_slots)} for slots in quantization.layers
    }
    prefixes: dict[int, str] = {}
    projections: set[str] = set()
    found: set[tuple[int, int, str]] = set()
    for name in names:
        parsed = parse_packed_name(name)
        layer = layer_index(name)
        if parsed is None or layer is None:
            # Layers for multi-token prediction keep plain experts: a layer that no slots are listed for, or outside
            # the model. A decoder layer without slots is refused when vLLM builds it.
            plain = is_outside(name) or (layer is not None and layer not in first_members)
            if ".experts." in name and not plain:
                raise FormatError(f"{where}: {name} is an expert tensor that is not packed; convert the source again")
            continue
        prefix, expert, projection = parsed
        if expert not in first_members.get(layer, set()):
            raise FormatError(
                f"{where}: {name} is unexpected, no slot of layer {layer} is named after expert {expert}; "
                f"convert the source again"
            )
        prefixes[layer] = prefix
        projections.add(projection)
        found.add((layer, expert, projection))
    for layer, experts in first_members.items():
        for expert in sorted(experts):
            for projection in sorted(projections) or ["*"]:
                if (layer, expert, projection) not in found:
                    name = packed_name(prefixes.get(layer, f"model.layers.{layer}.*.experts"), expert, projection)
                    raise FormatError(f"{where}: packed tensor {name} is missing; copy or convert the checkpoint again")
