"""The supported model families: where a checkpoint keeps its experts. A new family is one more declaration."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from .errors import CheckpointError


def _every_layer(config: Any) -> list[int]:
    return list(range(config.num_hidden_layers))


def _qwen_sparse_layers(config: Any) -> list[int]:
    return [
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
    ]


@dataclass(frozen=True)
class Family:
    """One architecture. Attribute names are those of its transformers config class.

    `projections` are the gate, up and down matrices' names on disk, under
    `model.layers.{layer}.{moe_block}.experts.{expert}.`; transformers itself calls the block `mlp` in every family.
    """

    architecture: str
    moe_block: str
    projections: tuple[str, str, str]
    num_experts: str
    intermediate_size: str
    moe_layers: Callable[[Any], list[int]]


_QWEN2_MOE = Family(
    architecture="Qwen2MoeForCausalLM",
    moe_block="mlp",
    projections=("gate_proj", "up_proj", "down_proj"),
    num_experts="num_experts",
    intermediate_size="moe_intermediate_size",
    moe_layers=_qwen_sparse_layers,
)

FAMILIES = {
    family.architecture: family
    for family in (
        Family(
            architecture="MixtralForCausalLM",
            moe_block="block_sparse_moe",
            projections=("w1", "w3", "w2"),
            num_experts="num_local_experts",
            intermediate_size="intermediate_size",
            moe_layers=_every_layer,
        ),
        _QWEN2_MOE,
        replace(_QWEN2_MOE, architecture="Qwen3MoeForCausalLM"),
        replace(
            _QWEN2_MOE,
            architecture="OlmoeForCausalLM",
            intermediate_size="intermediate_size",
            moe_layers=_every_layer,
        ),
    )
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

    def layer_prefix(self, layer: int) -> str:
        return f"model.layers.{layer}."

    def experts_prefix(self, layer: int) -> str:
        """What `{expert}.{projection}.<suffix>` is appended to, without the dot between."""
        return f"model.layers.{layer}.{self.family.moe_block}.experts"

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """(intermediate_size, hidden_size) for gate and up, (hidden_size, intermediate_size) for down."""
        down = self.family.projections[2]
        shape = (self.intermediate_size, self.hidden_size)
        return shape[::-1] if projection == down else shape

    def expert_name(self, layer: int, expert: int, projection: str) -> str:
        return f"{self.experts_prefix(layer)}.{expert}.{projection}.weight"


def find_moe_shape(config: PretrainedConfig, where: str) -> MoEShape:
    """The family and sizes of a config; raises CheckpointError where no registered family fits."""
    architectures = list(config.architectures or [])
    family = next((FAMILIES[name] for name in architectures if name in FAMILIES), None)
    if family is None:
        raise CheckpointError(
            f"{where} has architectures {architectures}, which are not supported; supported are {sorted(FAMILIES)}"
        )
    layers = family.moe_layers(config)
    if not layers:
        raise CheckpointError(f"{where} describes a {family.architecture} in which no layer has experts to pack")
    return MoEShape(
        family=family,
        num_experts=getattr(config, family.num_experts),
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, family.intermediate_size),
        num_hidden_layers=config.num_hidden_layers,
        moe_layers=tuple(layers),
    )
