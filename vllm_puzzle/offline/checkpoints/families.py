"""The supported model families: where a checkpoint keeps its experts.

A new family is one more declaration; in one file, since most differ from another one in a line, it may be a long one.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from ..errors import CheckpointError
from .config_values import ConfigValues

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def _every_layer(values: ConfigValues) -> list[int]:
    return list(range(values.integer("num_hidden_layers")))


def _qwen_sparse_layers(values: ConfigValues) -> list[int]:
    dense, step = values.integers("mlp_only_layers"), values.integer("decoder_sparse_step")
    return [layer for layer in _every_layer(values) if layer not in dense and (layer + 1) % step == 0]


def _deepseek_layers(values: ConfigValues) -> list[int]:
    # transformers does not read moe_layer_freq; vLLM does so.
    every, first = values.integer("moe_layer_freq", default=1), values.integer("first_k_dense_replace", least=0)
    return [layer for layer in _every_layer(values) if layer >= first and layer % every == 0]


def _ernie_layers(values: ConfigValues) -> list[int]:
    first, last = values.integer("moe_layer_start_index", least=0), values.integer("moe_layer_end_index", least=-1)
    every = values.integer("moe_layer_interval")
    return [layer for layer in _every_layer(values) if first <= layer <= last and (layer + 1) % every == 0]


def _granite_layers(values: ConfigValues) -> list[int]:
    # Granite 4 has models without experts under the same architecture.
    return _every_layer(values) if values.integer("num_local_experts", least=0) > 0 else []


def _llama4_layers(values: ConfigValues) -> list[int]:
    chosen = values.integers("moe_layers")
    return [layer for layer in _every_layer(values) if layer in chosen]


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
class Family:
    """One architecture. Attribute names are those of its transformers config class.

    `projections` are the gate, up and down matrices' names on disk, under
    `model.layers.{layer}.{moe_block}.experts.{expert}.`. `module` is the block's name in transformers' own model, and
    `renames` are the other names that differ there: pairs of a beginning on disk and one in transformers, both below
    the layer. `fused` are the layouts besides one tensor per matrix that a checkpoint may have; `hub_is_fused` says
    that those on the hub have the first of them. `num_mtp_layers` counts the layers for multi-token prediction after
    the decoder's, which stay as they are. `residual_multiplier` scales what experts add to the residual stream.
    `weighs_inputs` says that router weights go into the experts, not onto what comes out.
    """

    architecture: str
    moe_block: str
    projections: tuple[str, str, str]
    num_experts: str
    intermediate_size: str
    moe_layers: Callable[[ConfigValues], list[int]]
    module: str = "mlp"
    renames: tuple[tuple[str, str], ...] = ()
    fused: tuple[Fused, ...] = (Fused(),)
    hub_is_fused: bool = False
    num_mtp_layers: str | None = None
    residual_multiplier: str | None = None
    weighs_inputs: bool = False

    def module_name(self, name: str) -> str:
        """What transformers calls a tensor of the hub, both below the layer."""
        for on_disk, module in self._beginnings:
            if name.startswith(on_disk):
                return module + name.removeprefix(on_disk)
        return name

    def hub_name(self, name: str) -> str:
        """The inverse of `module_name`; a name of the hub stays."""
        if any(name.startswith(on_disk) for on_disk, _ in self._beginnings):
            return name
        for on_disk, module in self._beginnings:
            if name.startswith(module):
                return on_disk + name.removeprefix(module)
        return name

    @property
    def _beginnings(self) -> tuple[tuple[str, str], ...]:
        block = () if self.moe_block == self.module else ((f"{self.moe_block}.", f"{self.module}."),)
        return self.renames + block


_MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    moe_block="block_sparse_moe",
    projections=("w1", "w3", "w2"),
    num_experts="num_local_experts",
    intermediate_size="intermediate_size",
    moe_layers=_every_layer,
)

_QWEN2_MOE = Family(
    architecture="Qwen2MoeForCausalLM",
    moe_block="mlp",
    projections=("gate_proj", "up_proj", "down_proj"),
    num_experts="num_experts",
    intermediate_size="moe_intermediate_size",
    moe_layers=_qwen_sparse_layers,
)

_DEEPSEEK_V2 = replace(
    _QWEN2_MOE,
    architecture="DeepseekV2ForCausalLM",
    num_experts="n_routed_experts",
    moe_layers=_deepseek_layers,
)

_DEEPSEEK_V3 = replace(_DEEPSEEK_V2, architecture="DeepseekV3ForCausalLM", num_mtp_layers="num_nextn_predict_layers")

_GRANITE_MOE = Family(
    architecture="GraniteMoeForCausalLM",
    moe_block="block_sparse_moe",
    projections=("gate_proj", "up_proj", "down_proj"),
    num_experts="num_local_experts",
    intermediate_size="intermediate_size",
    moe_layers=_granite_layers,
    module="block_sparse_moe",
    renames=(("block_sparse_moe.router.layer.", "block_sparse_moe.router."),),
    fused=(Fused("input_linear.weight", "output_linear.weight"), Fused()),
    hub_is_fused=True,
    residual_multiplier="residual_multiplier",
)

FAMILIES = {
    family.architecture: family
    for family in (
        _MIXTRAL,
        _QWEN2_MOE,
        replace(_QWEN2_MOE, architecture="Qwen3MoeForCausalLM"),
        replace(_QWEN2_MOE, architecture="Qwen3NextForCausalLM"),
        replace(
            _QWEN2_MOE,
            architecture="OlmoeForCausalLM",
            intermediate_size="intermediate_size",
            moe_layers=_every_layer,
        ),
        _DEEPSEEK_V2,
        _DEEPSEEK_V3,
        replace(_DEEPSEEK_V3, architecture="Glm4MoeForCausalLM"),
        replace(
            _MIXTRAL,
            # As the hub and vLLM spell it; transformers' own class is PhimoeForCausalLM.
            architecture="PhiMoEForCausalLM",
            renames=(("block_sparse_moe.gate.", "mlp.router."),),
        ),
        replace(
            _QWEN2_MOE,
            architecture="Ernie4_5_MoeForCausalLM",
            num_experts="moe_num_experts",
            moe_layers=_ernie_layers,
            renames=(("mlp.moe_statics.", "mlp.gate.moe_statics."),),
        ),
        _GRANITE_MOE,
        replace(_GRANITE_MOE, architecture="GraniteMoeHybridForCausalLM"),
        Family(
            architecture="Llama4ForCausalLM",
            moe_block="feed_forward",
            projections=("gate_proj", "up_proj", "down_proj"),
            num_experts="num_local_experts",
            intermediate_size="intermediate_size",
            moe_layers=_llama4_layers,
            module="feed_forward",
            fused=(Fused(transposed=True),),
            hub_is_fused=True,
            weighs_inputs=True,
        ),
        replace(_MIXTRAL, architecture="MiniMaxM2ForCausalLM"),
    )
}

# Why architectures that a user may well try are not supported.
_REFUSED = {
    "GptOssForCausalLM": "its experts have biases, and gate and up lie interleaved in MXFP4 blocks",
    "Llama4ForConditionalGeneration": "it reads images too; of Llama 4 only Llama4ForCausalLM, the text model, is",
}


@dataclass(frozen=True)
class MoEShape:
    """A family applied to one checkpoint's config: which layers have experts, how many, and how large."""

    family: Family
    num_experts: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    moe_layers: tuple[int, ...]
    num_mtp_layers: int = 0
    residual_multiplier: float = 1.0

    def layer_prefix(self, layer: int) -> str:
        return f"model.layers.{layer}."

    def block_prefix(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.family.moe_block}."

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

    def is_mtp_name(self, name: str) -> bool:
        """Whether a tensor is of a layer for multi-token prediction: after the decoder's, or outside the model."""
        layer = _LAYER.match(name)
        if layer is None:
            return name.startswith("mtp.")
        return 0 <= int(layer[1]) - self.num_hidden_layers < self.num_mtp_layers

    def hub_name(self, name: str) -> str:
        """A tensor's name on the hub, given that or transformers' own."""
        layer = _LAYER.match(name)
        return name if layer is None else layer[0] + self.family.hub_name(name.removeprefix(layer[0]))


def find_moe_shape(config: PretrainedConfig, where: str) -> MoEShape:
    """The family and sizes of a config.

    Raises:
        CheckpointError: no registered family fits, or a value that any command computes with is out of its range.
    """
    stated = config.architectures
    # transformers does not check what they are.
    if stated is not None and not isinstance(stated, list):
        raise CheckpointError(f"{where} has architectures {stated!r} where a list is expected; correct it")
    architectures = [name for name in stated or [] if isinstance(name, str)]
    family = next((FAMILIES[name] for name in architectures if name in FAMILIES), None)
    if family is None:
        reason = next((f" ({_REFUSED[name]})" for name in architectures if name in _REFUSED), "")
        raise CheckpointError(
            f"{where} has architectures {stated}, which are not supported{reason}; supported are {sorted(FAMILIES)}"
        )
    values = ConfigValues(config, where)
    layers = family.moe_layers(values)
    if not layers:
        raise CheckpointError(f"{where} describes a {family.architecture} in which no layer has experts to pack")
    num_experts = values.integer(family.num_experts)
    top_k = values.integer("num_experts_per_tok", most=num_experts)
    if family.weighs_inputs and top_k != 1:
        raise CheckpointError(
            f"{where} has num_experts_per_tok {top_k}; {family.architecture} weighs the inputs of its experts, which "
            f"is supported for 1"
        )
    hidden_size = values.integer("hidden_size")
    values.integer("vocab_size")
    values.integer("max_position_embeddings")
    values.integer("num_attention_heads", most=hidden_size)
    for name in ("num_key_value_heads", "head_dim", "kv_lora_rank", "qk_rope_head_dim"):
        # A latent or a head may be wider than a small model; none is as wide as this.
        values.optional_integer(name, most=1 << 20)
    values.activation("hidden_act")
    return MoEShape(
        family=family,
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=values.integer(family.intermediate_size),
        num_hidden_layers=values.integer("num_hidden_layers"),
        moe_layers=tuple(layers),
        num_mtp_layers=(values.optional_integer(family.num_mtp_layers, least=0) or 0) if family.num_mtp_layers else 0,
        residual_multiplier=values.number(family.residual_multiplier) if family.residual_multiplier else 1.0,
    )
