"""What a model has beside its routed experts: the tensors that transformers' own model of a config loads.

Neither the converter nor vLLM's loader would miss one of them by itself: the converter copies what it finds, and of a
quantized model vLLM leaves as it was allocated what the checkpoint does not hold.
"""

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from .format import FormatError, is_expert_tensor, layer_index

_BLOCK = re.compile(r"\.layers\.\d+\.(.+)\.experts\.")

# How many names an error message gives.
_SHOWN = 4


def is_defined(config: Any) -> bool:
    """Whether transformers has the model that `config`, a PretrainedConfig, names as its architecture."""
    return _auto_class(config) is not None


def is_draft(config: Any) -> bool:
    """Whether a config is of the part of a checkpoint that only predicts further tokens, as vLLM renames it."""
    return any("MTP" in architecture for architecture in config.architectures or [])


def _auto_class(config: Any) -> Any:
    """transformers' class that makes the model of a config's architecture and type, None where it has none."""
    # Phi-3.5-MoE has other capitals on the hub.
    architectures = [architecture.lower() for architecture in config.architectures or []]
    kinds = (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForMultimodalLM),
    )
    for mapping, auto_class in kinds:
        model: Any = mapping.get(type(config), None)
        if model is not None and model.__name__.lower() in architectures:
            return auto_class
    return None


def empty_model(config: Any, where: str = "this config.json") -> Any:
    """transformers' own model of a PretrainedConfig, bfloat16, on the meta device: it has no weights.

    `where` is what an error message calls the config.

    Raises:
        FormatError: transformers cannot build it.
    """
    config = copy.deepcopy(config)
    # None of these changes a name, a shape or what a layer computes, and a config may ask for what is not installed
    # here (flash attention, where a training run wrote it) or has no row of the embedding.
    config._attn_implementation = config._experts_implementation = None
    config.get_text_config().pad_token_id = config.pad_token_id = None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    auto_class = _auto_class(config) or AutoModelForCausalLM
    try:
        with torch.device("meta"), _silent_transformers():
            return auto_class.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    except Exception as error:
        # Whatever a config can break in a model's constructor.
        reason = " ".join(str(error).split())
        if isinstance(error, LookupError):
            # Its text is a name alone.
            reason = f"it does not know {reason}"
        raise FormatError(
            f"transformers cannot build the model of {where}: {reason}; correct the value that it stumbles over"
        ) from None


def dense_tensors(
    model: Any, moe_layers: Collection[int], plain_layers: Collection[int] = ()
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a model needs outside its routed experts, by the tensor's name on the hub.

    What is tied to another tensor need not be stored and is left out, and so are layers for multi-token prediction.

    Args:
        model: what `empty_model` returns.
        moe_layers: the layers with routed experts. Where transformers has other ones, nothing is known of their block.
        plain_layers: those of them whose experts are asked for, too.
    """
    state = model.state_dict()
    experts = {name for name in state if is_expert_tensor(name)}
    blocks = {match[1] for match in map(_BLOCK.search, experts) if match is not None}
    unknown = {layer_index(name) for name in experts} ^ set(moe_layers)
    beside = tuple(f".layers.{layer}.{block}." for layer in unknown for block in blocks)
    dense = {
        name: tensor
        for name, tensor in state.items()
        if (name not in experts or layer_index(name) in plain_layers)
        and name not in model.all_tied_weights_keys
        and not any(part in name for part in beside)
    }
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, dense).items()}


def hub_names(model: Any) -> dict[str, str]:
    """What each tensor outside the routed experts is called on the hub, by its name in the model.

    Those that are stored there in another form are left out.

    Args:
        model: what `empty_model` returns.
    """
    dense = {name: tensor for name, tensor in model.state_dict().items() if not is_expert_tensor(name)}
    names = {id(tensor): name for name, tensor in dense.items()}
    stored = revert_weight_conversion(model, dense)
    return {names[id(tensor)]: hub_name for hub_name, tensor in stored.items() if id(tensor) in names}


def check_dense_tensors(
    found: Mapping[str, tuple[int, ...] | None], expected: Mapping[str, tuple[int, ...]], where: str, mend: str
) -> None:
    """Raises FormatError where a tensor is missing or has another shape.

    Args:
        found: the shapes of a checkpoint's tensors, None where only the name is known.
        expected: what `dense_tensors` says.
        where: what an error message calls the checkpoint; `mend` is what it advises.
    """
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise FormatError(
            f"{where} lacks {_count(missing, 'tensor')} that the model of config.json needs: {_list(missing)}; {mend}"
        )
    wrong = [name for name, shape in expected.items() if found[name] not in (None, shape)]
    if wrong:
        shapes = [f"{name} {list(found[name] or ())} for {list(expected[name])}" for name in wrong]
        raise FormatError(
            f"{where} has {_count(wrong, 'tensor')} of another shape than config.json implies: {_list(shapes)}; {mend}"
        )


def _count(names: Collection[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''}"


def _list(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Without its advice on kernels: nothing is run."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
