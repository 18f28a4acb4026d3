"""How expert tensors are named on disk: `<experts prefix>.<expert's id>.<projection>.<suffix>`.

A slot of packed pairs has a `weight_packed` for each projection and is named after its first member. A coded expert has
`weight_packed` and `weight_codebook` for gate, which are up's too, and for down, and a `weight_scale` for each.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .layout import FormatError
from .schema import PuzzleMoEQuantizationConfig

# What vLLM's stock model classes route into `w13_*` / `w2_*` parameters in every family tried.
PACKED_SUFFIX = "weight_packed"
CODEBOOK_SUFFIX = "weight_codebook"
SCALE_SUFFIX = "weight_scale"

_EXPERT = re.compile(
    r"(?P<prefix>.+\.experts)\.(?P<expert>\d+)\.(?P<projection>\w+)\."
    rf"(?P<suffix>{PACKED_SUFFIX}|{CODEBOOK_SUFFIX}|{SCALE_SUFFIX})"
)
PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""What gate, up and down are called."""

_LAYER = re.compile(r"(?P<beginning>(?:.*?\.)?layers\.)(?P<layer>\d+)\.")
_OUTSIDE = re.compile(r"(?:.+\.)?mtp\.")


def packed_name(prefix: str, expert: int, projection: str) -> str:
    """The name of a slot's matrix, e.g. `model.layers.0.mlp.experts` + 3 + `gate_proj`."""
    return ExpertTensor(prefix, expert, projection, PACKED_SUFFIX).name


class ExpertTensor(NamedTuple):
    """What the name of a packed or coded expert's tensor consists of."""

    prefix: str
    expert: int
    projection: str
    suffix: str

    @property
    def name(self) -> str:
        return f"{self.prefix}.{self.expert}.{self.projection}.{self.suffix}"


def parse_expert_name(name: str) -> ExpertTensor | None:
    """The parts of the name of a packed or coded expert's tensor, or None for any other tensor's name."""
    match = _EXPERT.fullmatch(name)
    return None if match is None else ExpertTensor(match["prefix"], int(match[2]), match[3], match[4])


def parse_packed_name(name: str) -> tuple[str, int, str] | None:
    """The (prefix, expert, projection) of a `weight_packed` tensor, or None for any other tensor's name."""
    parsed = parse_expert_name(name)
    return None if parsed is None or parsed.suffix != PACKED_SUFFIX else parsed[:3]


def coded_tensors(prefix: str, expert: int, projections: Sequence[str]) -> list[ExpertTensor]:
    """The tensors of a coded expert, in the order in which they are written; `projections` are gate, up and down."""
    gate, up, down = projections
    kinds = (
        (gate, PACKED_SUFFIX),
        (gate, CODEBOOK_SUFFIX),
        (gate, SCALE_SUFFIX),
        (up, SCALE_SUFFIX),
        (down, PACKED_SUFFIX),
        (down, CODEBOOK_SUFFIX),
        (down, SCALE_SUFFIX),
    )
    return [ExpertTensor(prefix, expert, *kind) for kind in kinds]


def layer_index(name: str) -> int | None:
    """The layer that a tensor or module name lies in, e.g. 3 of `model.layers.3.mlp.experts`, whatever comes before.

    Layers for multi-token prediction count on from the decoder's; None for those under `mtp.`, which count anew.
    """
    match = None if is_outside(name) else _LAYER.match(name + ".")
    return None if match is None else int(match["layer"])


def layer_beginning(name: str) -> str | None:
    """What a name begins with up to the layer's number, e.g. `model.language_model.layers.`; None outside layers."""
    match = _LAYER.match(name)
    return None if match is None else match["beginning"]


def is_outside(name: str) -> bool:
    """Whether a tensor or module is of a part for multi-token prediction that lies beside the model, as Qwen's."""
    return _OUTSIDE.match(name) is not None


def is_expert_tensor(name: str) -> bool:
    """Whether a tensor belongs to experts, routed or not; some families keep the bias of the router among them."""
    return ".experts." in name and not name.endswith((".e_score_correction_bias", ".expert_bias"))


def check_packed_names(names: Iterable[str], quantization: PuzzleMoEQuantizationConfig, where: str) -> None:
    """Raises FormatError for the first expert tensor that the layers do not account for, or that one of them lacks.

    vLLM itself skips expert tensors that it cannot place, and leaves what was not loaded as it was allocated.

    Experts elsewhere than where the packed ones are, as those of a vision tower or of a model for speech, stay plain.

    Args:
        names: every tensor name of the checkpoint.
        where: what an error message calls the checkpoint.
    """
    expected = _ExpectedNames(quantization)
    names = list(names)
    beginnings = {layer_beginning(name) for name in names if parse_expert_name(name)} or {None}
    prefixes: dict[int, str] = {}
    projections: set[str] = set()
    found: set[tuple[int, int, str, str]] = set()
    for name in names:
        parsed = parse_expert_name(name)
        layer = layer_index(name)
        if parsed is None or layer is None:
            # Layers for multi-token prediction keep plain experts: a layer that nothing is listed for, or outside
            # the model. A decoder layer without a list is refused when vLLM builds it.
            plain = is_outside(name) or (layer is not None and layer not in expected.experts)
            elsewhere = None not in beginnings and layer_beginning(name) not in beginnings
            if is_expert_tensor(name) and not plain and not elsewhere:
                raise FormatError(f"{where}: {name} is an expert tensor that is not packed; convert the source again")
            continue
        if reason := expected.why_not(layer, parsed):
            raise FormatError(f"{where}: {name} is unexpected, {reason}; convert the source again")
        prefixes[layer] = parsed.prefix
        projections.add(parsed.projection)
        found.add((layer, *parsed[1:]))
    for layer, experts in expected.experts.items():
        prefix = prefixes.get(layer, f"model.layers.{layer}.*.experts")
        for expert in sorted(experts):
            for tensor in expected.tensors(layer, prefix, expert, projections):
                if (layer, *tensor[1:]) not in found:
                    raise FormatError(
                        f"{where}: packed tensor {tensor.name} is missing; copy or convert the checkpoint again"
                    )


class _ExpectedNames:
    """The expert tensors that a `quantization_config` implies."""

    def __init__(self, quantization: PuzzleMoEQuantizationConfig) -> None:
        self._coded = {codes.layer for codes in quantization.coded_layers}
        self.experts = {
            slots.layer: {slots.first_member(slot) for slot in range(slots.num_slots)} for slots in quantization.layers
        }
        """The ids that tensors of a packed or coded layer are named after, by layer."""
        self.experts |= {codes.layer: set(range(codes.num_experts)) for codes in quantization.coded_layers}

    def why_not(self, layer: int, tensor: ExpertTensor) -> str | None:
        """Why a layer has no such tensor, None where it has."""
        if layer in self._coded:
            if tensor.expert not in self.experts[layer]:
                return f"layer {layer} has no expert {tensor.expert}"
            projections = next((names for names in PROJECTIONS if tensor.projection in names), PROJECTIONS[0])
            there = tensor in coded_tensors(tensor.prefix, tensor.expert, projections)
            return None if there else "a coded expert has no such tensor"
        if tensor.suffix != PACKED_SUFFIX:
            return f"layer {layer} has no coded experts"
        if tensor.expert not in self.experts.get(layer, set()):
            return f"no slot of layer {layer} is named after expert {tensor.expert}"
        return None

    def tensors(self, layer: int, prefix: str, expert: int, projections: set[str]) -> list[ExpertTensor]:
        """What an expert, or a slot that is named after it, has; `projections` are the names that were met."""
        if layer in self._coded:
            names = next((names for names in PROJECTIONS if projections & set(names)), PROJECTIONS[0])
            return coded_tensors(prefix, expert, names)
        return [ExpertTensor(prefix, expert, name, PACKED_SUFFIX) for name in sorted(projections) or ["*"]]
