"""Tiny random checkpoints of the configurations in tiny_configs.py, as transformers writes them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from tests.models.tiny_configs import MULTIMODAL, TEXT
from tests.tiny import _COMMON, _byte_tokenizer

# Where transformers writes otherwise than the hub has it: parts of names, an architecture, transposed experts.
_HUB_NAMES = {"kimi_k25": (".model.blocks.", ".model.layers.")}
_HUB_ARCHITECTURES = {"kimi_k25": "KimiK25ForConditionalGeneration", "phimoe": "PhiMoEForCausalLM"}
_HUB_TRANSPOSED = ("qwen3_vl_moe",)


def build(model_type: str, path: Path, **overrides: Any) -> Path:
    """Writes a tiny random checkpoint with a byte-level tokenizer; returns `path`.

    Router biases are random. A multimodal checkpoint has no processor.
    """
    if model_type in TEXT:
        values = {**_COMMON, **TEXT[model_type], **overrides}
    else:
        values = {**_with_common(MULTIMODAL[model_type]), **overrides}
    config = AutoConfig.for_model(model_type, **values)
    torch.manual_seed(len(model_type))
    model = _auto_class(type(config)).from_config(config, dtype=torch.bfloat16)
    for module in model.modules():
        for name in ("e_score_correction_bias", "expert_bias"):
            bias = getattr(module, name, None)
            if isinstance(bias, torch.Tensor):
                bias.data = 0.1 * torch.rand(bias.shape)
    model.save_pretrained(path)
    _write_as_on_the_hub(model_type, path)
    _byte_tokenizer().save_pretrained(path)
    return path


def _write_as_on_the_hub(model_type: str, path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    if model_type in _HUB_NAMES:
        tensors = {name.replace(*_HUB_NAMES[model_type]): tensor for name, tensor in tensors.items()}
    if model_type in _HUB_TRANSPOSED:
        for name in [name for name in tensors if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]:
            tensors[name] = tensors[name].mT.contiguous()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    if model_type in _HUB_ARCHITECTURES:
        config = json.loads((path / "config.json").read_text())
        config["architectures"] = [_HUB_ARCHITECTURES[model_type]]
        (path / "config.json").write_text(json.dumps(config))


def _with_common(values: dict[str, Any]) -> dict[str, Any]:
    """Puts what all tiny models have in common into the text model's part, wherever that lies."""
    if "text_config" in values:
        return {**values, "text_config": {**_COMMON, **values["text_config"]}, "tie_word_embeddings": False}
    return {**values, "thinker_config": _with_common(values["thinker_config"])}


def _auto_class(config_class: Any) -> Any:
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
        if config_class in auto._model_mapping:
            return auto
    raise ValueError(f"transformers has no model for {config_class.__name__}")


def architecture(model_type: str) -> str:
    """What `architectures` says in the config of a tiny model."""
    config_class = CONFIG_MAPPING[model_type]
    name: str = _auto_class(config_class)._model_mapping[config_class].__name__
    return _HUB_ARCHITECTURES.get(model_type, name)
