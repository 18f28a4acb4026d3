"""config.json as JSON, and as transformers reads it."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import CheckpointError, reason_of
from .architectures import ARCHITECTURES
from .families import FAMILIES

# transformers makes lists as long as these, before it checks anything.
_COUNTS = ("num_hidden_layers", "num_labels")
_MOST = 10_000

# Where configs of models that see or hear keep what is the text model's, if transformers has no class for them.
_TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config")

# Up to here every integer is a float of the same value.
_LARGEST_EXACT = 1 << 53


def read_raw_config(path: Path) -> dict[str, Any]:
    """The object in config.json of a folder, with floats where it has integers for what transformers wants as a float.

    transformers refuses `"router_aux_loss_coef": 0`, and vLLM reads configs by transformers.

    Raises:
        CheckpointError: no file, or no JSON object.
    """
    return _with_floats(read_json(path / "config.json"))


def read_config(path: Path) -> PretrainedConfig:
    """config.json as transformers reads it, with its defaults; runs no remote code.

    A type of model that transformers does not know, but vLLM serves, has no defaults.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    raw, where = read_json(path / "config.json"), path / "config.json"
    for name in _COUNTS:
        count = raw.get(name)
        if isinstance(count, int | float) and count > _MOST:
            raise CheckpointError(f"{where} has {name} {count}, more than any model's {_MOST}; correct it")
    quantization = raw.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(
            f"{where} has quantization_config {quantization!r} where an object is expected; correct it"
        )
    known = _config_class(raw)
    try:
        # For a type of model that it does not know transformers says so itself.
        if known is None and _is_only_vllms(raw):
            return PretrainedConfig.from_dict(raw)
        if known is None:
            return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        content, _ = PretrainedConfig.get_config_dict(path, local_files_only=True)
        return known.from_dict(_with_floats(content))
    except Exception as error:
        # Every model has a class of its own there, which checks and computes: it fails with whatever its code meets.
        raise CheckpointError(f"transformers cannot read {where}: {reason_of(error)}; correct it") from None


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """What a config says of the model that reads and writes text, as vLLM takes it; the config itself of others."""
    for name in _TEXT_SECTIONS:
        section = getattr(config, name, None)
        if isinstance(section, dict):
            return text_config(PretrainedConfig.from_dict(section))
    text = config.get_text_config()
    # Gemma 4's layers have heads of two sizes: where one number is asked for, that of most layers is meant.
    text.allow_global_per_layer_attribute_access = True
    return text


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises CheckpointError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; give the folder of a Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__} where an object is expected")
    return content


def _with_floats(raw: dict[str, Any]) -> dict[str, Any]:
    known = _config_class(raw)
    if known is None:
        return raw
    floats = {field.name for field in fields(known) if _is_float(field.type)}

    def with_float(name: str, value: Any) -> Any:
        is_float = known.attribute_map.get(name, name) in floats
        return float(value) if is_float and type(value) is int and abs(value) <= _LARGEST_EXACT else value

    return {name: with_float(name, value) for name, value in raw.items()}


def _is_only_vllms(raw: dict[str, Any]) -> bool:
    """Whether a config is of an architecture that vLLM has, and nothing is declared that transformers must show."""
    stated = raw.get("architectures")
    names = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    return bool(ARCHITECTURES.intersection(names)) and not FAMILIES.keys() & set(names)


def _config_class(raw: dict[str, Any]) -> Any:
    """transformers' class for a config, None where it has none."""
    model_type = raw.get("model_type")
    return CONFIG_MAPPING[model_type] if isinstance(model_type, str) and model_type in CONFIG_MAPPING else None


def _is_float(kind: Any) -> bool:
    kinds = get_args(kind) or (kind,)
    return float in kinds and int not in kinds
