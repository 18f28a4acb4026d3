"""A checkpoint's routed experts: which layers have them, how many, how large, and by which names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from vllm_puzzle.format import PuzzleMoEQuantizationConfig, is_outside, layer_beginning, layer_index, parse_expert_name

from ..errors import CheckpointError
from .architectures import ARCHITECTURES, REFUSED, VLLM_VERSION
from .config_values import ConfigValues
from .families import FAMILIES, Family
from .layout import Layout, Shapes, find_layout, layer_beginnings
from .model_config import text_config

# What configs call the same number.
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_TOP_K = ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_k")
_NUM_MTP_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers")
_ACTIVATION = ("hidden_act", "hidden_activation")


@dataclass(frozen=True)
class MoEShape:
    """A family applied to one checkpoint: which layers have experts, how many, how large, and what they are called.

    `layers` is what the names of the decoder's layers begin with. `top_k` experts see a token, and `hidden_act` is
    their activation.
    """

    family: Family
    num_experts: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    moe_layers: tuple[int, ...]
    num_mtp_layers: int = 0
    residual_multiplier: float = 1.0
    layers: str = "model.layers."
    top_k: int = 1
    hidden_act: str = "silu"

    def layer_prefix(self, layer: int) -> str:
        return f"{self.layers}{layer}."

    def block_prefix(self, layer: int) -> str:
        block = self.family.moe_block
        return f"{self.layer_prefix(layer)}{f'{block}.' if block else ''}"

    def experts_prefix(self, layer: int) -> str:
        """What `{expert}.{projection}.<suffix>` is appended to, without the dot between."""
        return f"{self.block_prefix(layer)}experts"

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """(intermediate_size, hidden_size) for gate and up, (hidden_size, intermediate_size) for down."""
        down = self.family.projections[2]
        shape = (self.intermediate_size, self.hidden_size)
        return shape[::-1] if projection == down else shape

    def expert_name(self, layer: int, expert: int, projection: str) -> str:
        return f"{self.experts_prefix(layer)}.{expert}.{projection}.weight"

    def expert_names(self, layer: int, expert: int) -> list[str]:
        """The names of an expert's gate, up and down."""
        return [self.expert_name(layer, expert, projection) for projection in self.family.projections]

    def layer_of(self, name: str) -> int | None:
        """The layer of the decoder, or after it for multi-token prediction, that a tensor lies in; None elsewhere."""
        return layer_index(name) if layer_beginning(name) == self.layers else None

    def is_beside(self, name: str) -> bool:
        """Whether a tensor is of no layer of the decoder, but of one for multi-token prediction or of another tower."""
        layer = self.layer_of(name)
        if layer is None:
            return is_outside(name) or layer_beginning(name) not in (None, self.layers)
        return 0 <= layer - self.num_hidden_layers < self.num_mtp_layers

    def hub_name(self, name: str) -> str:
        """A tensor's name on the hub, given that or transformers' own."""
        layer = self.layer_of(name)
        if layer is None:
            return name
        prefix = self.layer_prefix(layer)
        return prefix + self.family.hub_name(name.removeprefix(prefix))


def find_moe_shape(
    config: PretrainedConfig,
    where: str,
    tensors: Shapes | None = None,
    quantization: PuzzleMoEQuantizationConfig | None = None,
) -> MoEShape:
    """The family and sizes of a checkpoint.

    Args:
        where: the path of its config.
        tensors: what it holds; None where that is not known, which is enough for a declared family of the usual names.
        quantization: of a packed one.

    Raises:
        CheckpointError: vLLM does not know the architecture, its experts cannot be packed, or a value that any command
            computes with is out of its range.
    """
    architecture = _architecture(config, where)
    values = ConfigValues(text_config(config), where)
    family, layout = FAMILIES.get(architecture), None
    if family is None:
        layout = _find_layout(values, tensors or {}, quantization, where)
        family = _make_up_family(architecture, values, layout)
    layers = family.moe_layers(values)
    if not layers:
        raise CheckpointError(f"{where} describes a {family.architecture} in which no layer has experts to pack")
    num_experts = values.integer(family.num_experts) if layout is None else _stated_experts(values, layout)
    top_k = _top_k(values, family, num_experts)
    hidden_size = values.integer("hidden_size")
    values.integer("vocab_size")
    values.integer("max_position_embeddings")
    values.integer("num_attention_heads", most=hidden_size)
    for name in ("num_key_value_heads", "head_dim", "kv_lora_rank", "qk_rope_head_dim"):
        # A latent or a head may be wider than a small model; none is as wide as this.
        values.optional_integer(name, most=1 << 20)
    activation = _first(values, _ACTIVATION)
    if activation is None and family.is_declared:
        activation = "hidden_act"
    return MoEShape(
        family=family,
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=_intermediate_size(values, family, layout),
        num_hidden_layers=values.integer("num_hidden_layers"),
        moe_layers=tuple(layers),
        num_mtp_layers=(values.optional_integer(family.num_mtp_layers, least=0) or 0) if family.num_mtp_layers else 0,
        residual_multiplier=values.number(family.residual_multiplier) if family.residual_multiplier else 1.0,
        layers=_declared_beginning(tensors or {}, where) if layout is None else layout.layers,
        top_k=top_k,
        # vLLM's experts have this one where they are not told of another.
        hidden_act=values.activation(activation) if activation else "silu",
    )


def _architecture(config: PretrainedConfig, where: str) -> str:
    """The first architecture that a config names and vLLM has, if it is one whose experts can be packed."""
    stated = config.architectures
    # transformers does not check what they are.
    if stated is not None and not isinstance(stated, list):
        raise CheckpointError(f"{where} has architectures {stated!r} where a list is expected; correct it")
    names = [name for name in stated or [] if isinstance(name, str)]
    refused = next((name for name in names if name in REFUSED), None)
    known = next((name for name in names if name in ARCHITECTURES), None)
    if refused is not None:
        raise CheckpointError(f"{where} has architectures {stated}, which are not supported: {REFUSED[refused]}")
    if known is None:
        raise CheckpointError(
            f"{where} has architectures {stated}, which are not supported: they are no Mixture of Experts that vLLM "
            f"{VLLM_VERSION} serves"
        )
    return known


def _find_layout(
    values: ConfigValues, tensors: Shapes, quantization: PuzzleMoEQuantizationConfig | None, where: str
) -> Layout:
    _refuse_unusual(values)
    num_hidden_layers = values.integer("num_hidden_layers")
    if quantization is None:
        layout = find_layout(tensors, num_hidden_layers, where)
    else:
        packed = dict.fromkeys(name for name in tensors if parse_expert_name(name))
        found = find_layout(packed, num_hidden_layers, where)
        coded = [codes.layer for codes in quantization.coded_layers]
        stored = sorted([slots.layer for slots in quantization.layers] + coded + quantization.plain_layers)
        sizes = (quantization.hidden_size, quantization.intermediate_size)
        layout = Layout(found.layers, found.block, found.projections, tuple(stored), quantization.num_experts, sizes)
    if layout.sizes is not None and layout.sizes[0] != values.integer("hidden_size"):
        raise CheckpointError(
            f"{where} has hidden_size {values.config.hidden_size}, but its experts take {layout.sizes[0]} inputs; "
            f"experts on latent inputs cannot be packed"
        )
    return layout


def _refuse_unusual(values: ConfigValues) -> None:
    if getattr(values.config, "moe_apply_router_weight_on_input", False):
        raise CheckpointError(
            f"{values.where} has moe_apply_router_weight_on_input true: router weights go into its experts, and such "
            f"experts cannot be packed"
        )
    for name, value in sorted(vars(values.config).items()):
        parts = value if isinstance(value, list) else [value]
        if "swiglu" in name and any(isinstance(part, int | float) and part for part in parts):
            raise CheckpointError(
                f"{values.where} has {name} {value}: its experts limit or bend SwiGLU; such experts cannot be packed"
            )


def _make_up_family(architecture: str, values: ConfigValues, layout: Layout) -> Family:
    """A family of which all that a declaration says is as usual."""
    return Family(
        architecture=architecture,
        moe_block=layout.block,
        projections=layout.projections,
        num_experts=_first(values, _NUM_EXPERTS) or "num_experts",
        intermediate_size="moe_intermediate_size",
        moe_layers=lambda _: list(layout.moe_layers),
        module=layout.block,
        fused=(layout.fused,) if layout.fused else (),
        num_mtp_layers=_first(values, _NUM_MTP_LAYERS),
        residual_multiplier=_first(values, ("residual_multiplier",)),
        is_declared=False,
    )


def _first(values: ConfigValues, names: Sequence[str]) -> str | None:
    """The first of the names that a config gives a value."""
    return next((name for name in names if getattr(values.config, name, None) is not None), None)


def _stated_experts(values: ConfigValues, layout: Layout) -> int:
    """What the config says, so that tensors are compared with it; what the tensors say where it is silent."""
    name = _first(values, _NUM_EXPERTS)
    stated: Any = name and getattr(values.config, name)
    return values.integer(name) if name and not isinstance(stated, list) else layout.num_experts


def _top_k(values: ConfigValues, family: Family, num_experts: int) -> int:
    name = "num_experts_per_tok"
    if not family.is_declared:
        name = _first(values, _TOP_K) or name
        # Some have one for each layer.
        if isinstance(getattr(values.config, name, None), list):
            return max(values.integers(name))
    top_k = values.integer(name, most=num_experts)
    if family.weighs_inputs and top_k != 1:
        raise CheckpointError(
            f"{values.where} has num_experts_per_tok {top_k}; {family.architecture} weighs the inputs of its experts, "
            f"which is supported for 1"
        )
    return top_k


def _intermediate_size(values: ConfigValues, family: Family, layout: Layout | None) -> int:
    stated: Any = getattr(values.config, family.intermediate_size, None)
    if layout is None or (layout.sizes is None and isinstance(stated, int)):
        return values.integer(family.intermediate_size)
    if layout.sizes is None:
        raise CheckpointError(
            f"{values.where} does not say how large the experts are; put the checkpoint's shards beside it"
        )
    return values.integer(family.intermediate_size) if isinstance(stated, int) else layout.sizes[1]


def _declared_beginning(tensors: Shapes, where: str) -> str:
    beginnings = sorted(name for name in layer_beginnings(tensors) if not is_outside(name))
    if len(beginnings) > 1:
        raise CheckpointError(f"{where} has routed experts at more than one place: {', '.join(beginnings)}")
    return beginnings[0] if beginnings else "model.layers."
