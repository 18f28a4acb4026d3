"""Tiny random checkpoints of the configurations in tiny_configs.py, as transformers writes them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

from tests.models.tiny_configs import MULTIMODAL, TEXT
from tests.tiny import _COMMON, _byte_tokenizer

# Where transformers writes other names than the hub has: a part of every tensor's name, and the architecture.
_HUB_NAMES = {"kimi_k25": ((".model.blocks.", ".model.layers."), "KimiK25ForConditionalGeneration")}


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
    model = _from_config(config)
    for module in model.modules():
        for name in ("e_score_correction_bias", "expert_bias"):
            bias = getattr(module, name, None)
            if isinstance(bias, torch.Tensor):
                bias.data = 0.1 * torch.rand(bias.shape)
    model.save_pretrained(path)
    if model_type in _HUB_NAMES:
        _rename(path, *_HUB_NAMES[model_type])
    _byte_tokenizer().save_pretrained(path)
    return path


def _rename(path: Path, parts: tuple[str, str], architecture: str) -> None:
    tensors = load_file(path / "model.safetensors")
    renamed = {name.replace(*parts): tensor for name, tensor in tensors.items()}
    save_file(renamed, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))


def _with_common(values: dict[str, Any]) -> dict[str, Any]:
    """Puts what all tiny models have in common into the text model's part, wherever that lies."""
    if "text_config" in values:
        return {**values, "text_config": {**_COMMON, **values["text_config"]}, "tie_word_embeddings": False}
    return {**values, "thinker_config": _with_common(values["thinker_config"])}


def _from_config(config: Any) -> Any:
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        # A multimodal config also has a class for text alone.
        is_text = auto is AutoModelForCausalLM
        if type(config) in auto._model_mapping and not (is_text and config.get_text_config() is not config):
            return auto.from_config(config, dtype=torch.bfloat16)
    raise ValueError(f"transformers has no model for {config.model_type}")
