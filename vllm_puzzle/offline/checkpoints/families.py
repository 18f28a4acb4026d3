"""What a checkpoint's names, shapes and config do not show of its experts, by architecture.

A new family needs a declaration only where something here is unusual; `shape.py` finds the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .config_values import ConfigValues
from .layout import Fused


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
class Family:
    """One architecture. Attribute names are those of its transformers config class.

    `projections` are the gate, up and down matrices' names on disk, under
    `{beginning}layers.{layer}.{moe_block}.experts.{expert}.`. `module` is the block's name in transformers' own model,
    and `renames` are the other names that differ there: pairs of a beginning on disk and one in transformers, both
    below the layer. `fused` are the layouts besides one tensor per matrix that a checkpoint may have; `hub_is_fused`
    says that those on the hub have the first of them. `num_mtp_layers` counts the layers for multi-token prediction
    after the decoder's, which stay as they are. `residual_multiplier` scales what experts add to the residual stream.
    `weighs_inputs` says that router weights go into the experts, not onto what comes out. `is_declared` is false for
    one that was made up from what a checkpoint shows.
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
    is_declared: bool = True

    def hub_name(self, name: str) -> str:
        """What a tensor is called on the hub that has that name or transformers' own, both below the layer."""
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

_LLAMA4 = Family(
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
)

_QWEN3_5_MOE = replace(_QWEN2_MOE, architecture="Qwen3_5MoeForCausalLM", moe_layers=_every_layer)

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
        replace(_GRANITE_MOE, architecture="GraniteMoeSharedForCausalLM"),
        _LLAMA4,
        replace(_LLAMA4, architecture="Llama4ForConditionalGeneration"),
        replace(
            _QWEN2_MOE,
            architecture="Qwen3VLMoeForConditionalGeneration",
            fused=(Fused(transposed=True), Fused()),
            hub_is_fused=True,
        ),
        _QWEN3_5_MOE,
        replace(_QWEN3_5_MOE, architecture="Qwen3_5MoeForConditionalGeneration"),
        replace(_MIXTRAL, architecture="MiniMaxM2ForCausalLM"),
    )
}
