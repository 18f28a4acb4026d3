"""Values of a config that transformers accepts and vLLM refuses, which it would say only after the conversion."""

from typing import Any

from vllm_puzzle.format import ACTIVATIONS

from ..errors import CheckpointError
from .config_values import ConfigValues
from .shape import MoEShape

# By transformers' names, which vLLM translates (vllm/model_executor/layers/fused_moe/activation.py).
_OTHER_NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}


def check_servable(config: Any, shape: MoEShape, where: str) -> None:
    """Raises CheckpointError for a value with which the packed model could not be served.

    Args:
        config: of the text model.
        where: the path of the config.
    """
    known = [_OTHER_NAMES.get(name, name) for name in ACTIVATIONS]
    if shape.hidden_act not in known:
        raise CheckpointError(
            f"{where} has hidden_act {shape.hidden_act!r}, and packed experts are served with one of {known} alone; "
            f"serve this model unpacked"
        )
    values = ConfigValues(config, where)
    groups = values.optional_integer("n_group", most=shape.num_experts)
    if groups is not None and shape.num_experts % groups:
        raise CheckpointError(
            f"{where} has n_group {groups}, which does not divide its {shape.num_experts} experts; correct it"
        )
    if hasattr(config, "logits_scaling") and values.number("logits_scaling") == 0:
        raise CheckpointError(f"{where} has logits_scaling 0, by which logits are divided; correct it")
