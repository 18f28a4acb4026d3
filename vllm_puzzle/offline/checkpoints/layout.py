"""Where a checkpoint keeps its routed experts, as the names and shapes of its tensors show."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vllm_puzzle.format import PROJECTIONS

from ..errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...] | None]
"""Shapes of tensors by name; None where only the name is known."""

_MATRIX = re.compile(
    r"(?P<layers>(?:.+?\.)?layers\.)(?P<layer>\d+)\.(?P<block>(?:[^.]+\.)*?)experts\.(?P<expert>\d+)\."
    r"(?P<projection>\w+)\.(?:weight|weight_packed|weight_codebook|weight_scale)"
)
_WHOLE = re.compile(
    r"(?P<layers>(?:.+?\.)?layers\.)(?P<layer>\d+)\.(?P<block>(?:[^.]+\.)*?)experts\.(?P<kind>gate_up_proj|down_proj)"
)
# Parts for multi-token prediction, and what speaks, which vLLM does not serve.
_BESIDE = ("mtp.", "talker.")
_BIAS = re.compile(r".+\.layers\.\d+\.(?:.+\.)?experts\.(?:\d+\.\w+\.bias|(?:gate_up|down)_proj_bias)")


@dataclass(frozen=True)
class Fused:
    """All experts of a layer in two three-dimensional tensors, by their names below the MoE block.

    `gate_up` is (num_experts, 2 * intermediate_size, hidden_size), the rows of gate before those of up; `down` is
    (num_experts, hidden_size, intermediate_size). `transposed` says that the last two dimensions of both are swapped.
    """

    gate_up: str = "experts.gate_up_proj"
    down: str = "experts.down_proj"
    transposed: bool = False

    def shapes(self, num_experts: int, hidden_size: int, intermediate_size: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of `gate_up` and `down`."""
        sizes = ((2 * intermediate_size, hidden_size), (hidden_size, intermediate_size))
        return tuple((num_experts, *(size[::-1] if self.transposed else size)) for size in sizes)


@dataclass(frozen=True)
class Layout:
    """Routed experts whose names have one beginning up to the layer's number, and one block.

    Attributes:
        layers: the beginning, e.g. `model.language_model.layers.`.
        block: what stands between layer and `experts`, e.g. `mlp`; empty where nothing does.
        projections: gate, up and down.
        moe_layers: in ascending order.
        num_experts: of a layer.
        sizes: (hidden_size, intermediate_size); None where only names are known.
        fused: how they lie in three-dimensional tensors; None where each matrix is a tensor.
    """

    layers: str
    block: str
    projections: tuple[str, str, str]
    moe_layers: tuple[int, ...]
    num_experts: int
    sizes: tuple[int, int] | None
    fused: Fused | None = None


@dataclass
class _Found:
    """What the names of one beginning and one block say."""

    experts: dict[int, set[int]] = field(default_factory=dict)
    projections: set[str] = field(default_factory=set)
    whole: dict[int, dict[str, str]] = field(default_factory=dict)
    shapes: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)


def layer_beginnings(names: Iterable[str]) -> set[str]:
    """What names of experts begin with up to the layer's number, in whichever layout they are known in."""
    return {match["layers"] for name in names if (match := _MATRIX.fullmatch(name) or _WHOLE.fullmatch(name))}


def find_layout(tensors: Shapes, num_hidden_layers: int, where: str) -> Layout:
    """The layout of the decoder's routed experts; those of layers beyond it do not count.

    Args:
        where: what an error message calls the checkpoint.

    Raises:
        CheckpointError: there are none, more than one kind, or they are of a kind that cannot be packed.
    """
    if biased := next((name for name in sorted(tensors) if _BIAS.fullmatch(name)), None):
        raise CheckpointError(f"{where}: the experts have biases ({biased}), and experts with biases cannot be packed")
    kinds = _sort(tensors, num_hidden_layers)
    if not kinds:
        raise CheckpointError(
            f"{where} has no tensors named like model.layers.0.mlp.experts.0.gate_proj.weight or "
            f"model.layers.0.mlp.experts.gate_up_proj, so no experts are found in it to pack"
        )
    if len(kinds) > 1:
        names = [f"{layers}*.{block}experts" for layers, block in sorted(kinds)]
        raise CheckpointError(f"{where} has routed experts of more than one kind: {', '.join(names)}")
    ((layers, block), found) = kinds.popitem()
    read = _read_whole if found.whole else _read_matrices
    return read(found, layers, block.rstrip("."), where)


def _sort(tensors: Shapes, num_hidden_layers: int) -> dict[tuple[str, str], _Found]:
    kinds: dict[tuple[str, str], _Found] = {}
    for name, shape in tensors.items():
        match = _MATRIX.fullmatch(name) or _WHOLE.fullmatch(name)
        if match is None or name.startswith(_BESIDE) or int(match["layer"]) >= num_hidden_layers:
            continue
        found, layer = kinds.setdefault((match["layers"], match["block"]), _Found()), int(match["layer"])
        kind = match.groupdict().get("projection") or match["kind"]
        if match.re is _WHOLE:
            found.whole.setdefault(layer, {})[kind] = name
        else:
            found.experts.setdefault(layer, set()).add(int(match["expert"]))
            found.projections.add(kind)
        if shape is not None and (match.re is _WHOLE or name.endswith(".weight")):
            found.shapes.setdefault(kind, set()).add(shape)
    return kinds


def _read_matrices(found: _Found, layers: str, block: str, where: str) -> Layout:
    place = f"{where}: {layers}*.{f'{block}.' if block else ''}experts"
    projections = next((names for names in PROJECTIONS if set(names) == found.projections), None)
    if projections is None:
        known = " or ".join(", ".join(names) for names in PROJECTIONS)
        raise CheckpointError(f"{place} have {', '.join(sorted(found.projections))} where {known} are expected")
    counts = {max(experts) + 1 for experts in found.experts.values()}
    if len(counts) > 1:
        raise CheckpointError(f"{place} are not as many in every layer: {sorted(counts)}")
    sizes = None
    if found.shapes:
        # All that have another shape are found when each tensor is checked.
        down = min(found.shapes.get(projections[2], {()}))
        if len(down) != 2:
            raise CheckpointError(f"{place} have a {projections[2]} of shape {list(down)} where a matrix is expected")
        sizes = (down[0], down[1])
    return Layout(layers, block, projections, tuple(sorted(found.experts)), counts.pop(), sizes)


def _read_whole(found: _Found, layers: str, block: str, where: str) -> Layout:
    place = f"{where}: {layers}*.{f'{block}.' if block else ''}experts"
    gate_up, down = (min(found.shapes.get(kind, {()})) for kind in ("gate_up_proj", "down_proj"))
    if not found.shapes:
        raise CheckpointError(
            f"{place} lie in three-dimensional tensors whose sizes only the shards tell; put them beside the index"
        )
    if len(gate_up) == 3 and len(down) == 3 and gate_up[0] == down[0]:
        for transposed in (False, True):
            fused = Fused(transposed=transposed)
            sizes = (down[2], down[1]) if transposed else (down[1], down[2])
            if fused.shapes(down[0], *sizes) == (gate_up, down):
                return Layout(layers, block, PROJECTIONS[0], tuple(sorted(found.whole)), down[0], sizes, fused)
    raise CheckpointError(
        f"{place} have a gate_up_proj of {list(gate_up)} and a down_proj of {list(down)}, which are not gate and up "
        f"and down of the same experts"
    )
