"""The checkpoint of a variant: its configuration, its tensors and the dense model's tokenizer."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
)

from benchmarks.reference_model.experts import (
    CALIBRATION_SEQUENCE_LENGTH,
    NUM_EXPERTS,
    SHARED_INTERMEDIATE_SIZE,
    SPARSE_TOP_K,
    all_active_tensors,
    sparse_tensors,
)
from benchmarks.reference_model.twins import SKEWED_TOP_K, rotated, skew_routers
from benchmarks.reference_model.wheels import ReferenceModelError, load_dense, read_text

Variant = Literal["all-active", "sparse", "all-active-rotated", "sparse-rotated", "sparse-skewed"]

CALIBRATION_TOKENS = 16384


def _config(variant: Variant, dense: LlamaConfig) -> PreTrainedConfig:
    names = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act"
    names += " max_position_embeddings initializer_range rms_norm_eps rope_parameters tie_word_embeddings"
    names += " bos_token_id eos_token_id pad_token_id"
    common = {name: getattr(dense, name) for name in names.split()} | {"dtype": "bfloat16"}
    if variant.endswith("-rotated"):
        common["tie_word_embeddings"] = False
    if variant.startswith("all-active"):
        return MixtralConfig(
            architectures=["MixtralForCausalLM"],
            head_dim=dense.head_dim,
            intermediate_size=dense.intermediate_size // NUM_EXPERTS,
            num_local_experts=NUM_EXPERTS,
            num_experts_per_tok=NUM_EXPERTS,
            **common,
        )
    return Qwen2MoeConfig(
        architectures=["Qwen2MoeForCausalLM"],
        intermediate_size=dense.intermediate_size,
        moe_intermediate_size=(dense.intermediate_size - SHARED_INTERMEDIATE_SIZE) // NUM_EXPERTS,
        shared_expert_intermediate_size=SHARED_INTERMEDIATE_SIZE,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=_top_k(variant),
        norm_topk_prob=True,
        **common,
    )


def _top_k(variant: Variant) -> int:
    return SKEWED_TOP_K if variant == "sparse-skewed" else SPARSE_TOP_K


def _tensors(variant: Variant, dense: LlamaForCausalLM, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every tensor in bfloat16."""
    if variant.startswith("all-active"):
        tensors = all_active_tensors(dense)
    else:
        tensors = sparse_tensors(dense.float(), token_ids, _top_k(variant))
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    return rotated(tensors) if variant.endswith("-rotated") else tensors


def _skew(checkpoint: Path, tensors: dict[str, torch.Tensor], token_ids: torch.Tensor) -> None:
    """Exchanges the routers of a checkpoint, whose tensors are given, for those of a skewed twin."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    skew_routers(model, token_ids.reshape(-1, CALIBRATION_SEQUENCE_LENGTH))
    for index, layer in enumerate(model.model.layers):
        tensors[f"model.layers.{index}.mlp.gate.weight"] = layer.mlp.gate.weight.detach().to(torch.bfloat16)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def build(variant: Variant, out: Path, cache: Path) -> None:
    """Write a Hugging Face checkpoint in bfloat16, with tokenizer and chat template, to a new folder."""
    if out.exists():
        raise ReferenceModelError(f"{out} exists already; name a folder that does not, or delete it")
    dense, tokenizer = load_dense(cache)
    token_ids = tokenizer(read_text("c4", cache), return_tensors="pt").input_ids[0][:CALIBRATION_TOKENS]
    tensors = _tensors(variant, dense, token_ids)
    ids = {name: getattr(dense.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}

    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        partial = Path(folder, "checkpoint")
        partial.mkdir()
        _config(variant, dense.config).save_pretrained(partial)
        GenerationConfig(**ids).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        if variant == "sparse-skewed":
            _skew(partial, tensors, token_ids)
        partial.rename(out)
