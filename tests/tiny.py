"""Tiny checkpoints of every supported family, in the layout of the hub."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedTokenizerFast

# Odd multiples, so that a swap of two sizes cannot go unnoticed.
HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOP_K, NUM_LAYERS = 96, 40, 8, 2, 3

_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 256,
    "vocab_size": 259,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "tie_word_embeddings": False,
    # Large enough for the experts to decide the next token.
    "initializer_range": 0.15,
}

_DEEPSEEK: dict[str, Any] = {
    "intermediate_size": 64,
    "moe_intermediate_size": INTERMEDIATE_SIZE,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.7,
    "num_key_value_heads": 3,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
}

_GRANITE: dict[str, Any] = {
    "intermediate_size": INTERMEDIATE_SIZE,
    "num_local_experts": NUM_EXPERTS,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": INTERMEDIATE_SIZE, "num_local_experts": NUM_EXPERTS},
    "qwen2_moe": {
        "intermediate_size": 64,
        "moe_intermediate_size": INTERMEDIATE_SIZE,
        "shared_expert_intermediate_size": 48,
        "num_experts": NUM_EXPERTS,
        "mlp_only_layers": [1],
        "norm_topk_prob": False,
    },
    "qwen3_moe": {
        "intermediate_size": 64,
        "moe_intermediate_size": INTERMEDIATE_SIZE,
        "num_experts": NUM_EXPERTS,
        "head_dim": 32,
        "norm_topk_prob": True,
    },
    "olmoe": {"intermediate_size": INTERMEDIATE_SIZE, "num_experts": NUM_EXPERTS, "num_key_value_heads": 3},
    "deepseek_v2": {
        **_DEEPSEEK,
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
    },
    "deepseek_v3": {
        **_DEEPSEEK,
        "q_lora_rank": 28,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
    },
    "glm4_moe": {
        "intermediate_size": 64,
        "moe_intermediate_size": INTERMEDIATE_SIZE,
        "n_routed_experts": NUM_EXPERTS,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.7,
        "head_dim": 32,
        "use_qk_norm": True,
    },
    "phimoe": {
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_local_experts": NUM_EXPERTS,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "ernie4_5_moe": {
        "intermediate_size": 64,
        "moe_intermediate_size": INTERMEDIATE_SIZE,
        "moe_num_experts": NUM_EXPERTS,
        "moe_k": TOP_K,
        "moe_num_shared_experts": 1,
    },
    "granitemoe": _GRANITE,
    "granitemoehybrid": {
        **_GRANITE,
        "shared_intermediate_size": 48,
        "position_embedding_type": "rope",
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "mamba_n_heads": 6,
        "mamba_d_state": 16,
        "mamba_chunk_size": 32,
    },
    "llama4_text": {
        "intermediate_size": INTERMEDIATE_SIZE,
        "intermediate_size_mlp": 64,
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": 1,
        # Every second layer.
        "interleave_moe_layer_step": 2,
        "num_hidden_layers": 4,
        "head_dim": 32,
        # Two layers with rotary embeddings and a window, two without.
        "no_rope_layers": [1, 0, 1, 0],
        "attention_chunk_size": 128,
    },
    "minimax_m2": {
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_local_experts": NUM_EXPERTS,
        "head_dim": 32,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    },
    "qwen3_next": {
        "intermediate_size": 64,
        "moe_intermediate_size": INTERMEDIATE_SIZE,
        "shared_expert_intermediate_size": 48,
        "num_experts": NUM_EXPERTS,
        "head_dim": 32,
        "norm_topk_prob": True,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}

_USUAL: dict[str, Any] = {
    "intermediate_size": 64,
    "moe_intermediate_size": INTERMEDIATE_SIZE,
    "num_experts": NUM_EXPERTS,
    "head_dim": 32,
}

_ATTENTION = ["full_attention"] * NUM_LAYERS

# What no declaration says anything of: all of it is in names, shapes and config.
UNDECLARED: dict[str, dict[str, Any]] = {
    "afmoe": {**_USUAL, "num_dense_layers": 1, "layer_types": _ATTENTION, "num_shared_experts": 1},
    "cohere2_moe": {**_USUAL, "intermediate_size": INTERMEDIATE_SIZE},
    "deepseek_v32": {**_DEEPSEEK, "q_lora_rank": 28},
    "exaone_moe": {
        **_USUAL,
        "num_shared_experts": 1,
        "is_moe_layer": [False, True, True],
        "layer_types": _ATTENTION,
        "n_group": 1,
        "topk_group": 1,
    },
    "flex_olmo": {"intermediate_size": INTERMEDIATE_SIZE, "num_experts": NUM_EXPERTS, "num_key_value_heads": 3},
    "gemma4_text": {
        **_USUAL,
        "enable_moe_block": True,
        "top_k_experts": TOP_K,
        "hidden_size_per_layer_input": 0,
        # The layers that see everything have larger heads.
        "global_head_dim": 64,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "glm4_moe_lite": {**_DEEPSEEK, "q_lora_rank": 28, "head_dim": 32, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "glm_moe_dsa": {**_DEEPSEEK, "q_lora_rank": 28},
    "granitemoe_swa": {**_GRANITE, "shared_intermediate_size": 48},
    "hunyuan_v1_moe": {
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_experts": NUM_EXPERTS,
        "moe_topk": TOP_K,
        "head_dim": 32,
    },
    "hy_v3": _USUAL,
    "jamba": {
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_experts": NUM_EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 8,
    },
    "kimi_linear": _USUAL,
    "laguna": _USUAL,
    "lfm2_moe": {**_USUAL, "num_dense_layers": 1, "layer_types": ["full_attention", "full_attention", "conv"]},
    "mellum": _USUAL,
    "mimo_v2_flash": {
        "intermediate_size": 64,
        "moe_intermediate_size": INTERMEDIATE_SIZE,
        "n_routed_experts": NUM_EXPERTS,
        "head_dim": 32,
        "v_head_dim": 32,
        # Layers with a window have twice as many of keys and values.
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}

_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": HIDDEN_SIZE,
    "patch_size": 4,
    "image_size": 16,
}

_TOKENS = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}


def _rope(sections: list[int], **more: Any) -> dict[str, Any]:
    """Rotary embeddings of time, height and width; the sections are halves of what a head has for each."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **more}


# Models that see, by what they have beside the configs of their text models.
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl_moe": (
        {**_USUAL, "norm_topk_prob": True, "rope_parameters": _rope([8, 4, 4], mrope_interleaved=True)},
        {**_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        _TOKENS,
    ),
    "qwen3_5_moe": (
        {
            **_USUAL,
            "shared_expert_intermediate_size": 48,
            "layer_types": _ATTENTION,
            "rope_parameters": _rope([2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.25),
        },
        {**_VISION, "num_position_embeddings": 16},
        _TOKENS,
    ),
    "llama4": (
        FAMILIES["llama4_text"],
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "image_size": 16,
            "patch_size": 4,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        {"image_token_index": 250},
    ),
    "glm4v_moe": (
        {**FAMILIES["glm4_moe"], "rope_parameters": _rope([4, 2, 2], partial_rotary_factor=0.5)},
        _VISION,
        _TOKENS,
    ),
}

# The classes that transformers spells otherwise than the hub.
_HUB_ARCHITECTURES = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}

# The three-dimensional tensors of the families that are published with them.
_FUSED = {
    "input_linear.weight": ("gate_proj", "up_proj"),
    "output_linear.weight": ("down_proj",),
    "experts.gate_up_proj": ("gate_proj", "up_proj"),
    "experts.down_proj": ("down_proj",),
}


def build_tiny(
    family: str, path: Path, router_bias: bool = True, save: dict[str, Any] | None = None, **overrides: Any
) -> Path:
    """Writes a tiny random checkpoint with a byte-level tokenizer; returns `path`.

    Args:
        router_bias: where the family's router has a bias by which it chooses, makes that random; it is zero otherwise.
        save: options of `save_pretrained`.
    """
    config = AutoConfig.for_model(family, **{**_COMMON, **(FAMILIES | UNDECLARED)[family], **overrides})
    torch.manual_seed(len(family))
    return _save(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), path, router_bias, save)


def build_tiny_multimodal(family: str, path: Path) -> Path:
    """As `build_tiny`, of a model that sees."""
    text, vision, tokens = MULTIMODAL[family]
    config = AutoConfig.for_model(family, text_config={**_COMMON, **text}, vision_config=vision, **tokens)
    torch.manual_seed(len(family))
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        # Some parts of towers are left as they were allocated.
        if parameter.ndim < 2 or not parameter.isfinite().all():
            parameter.data = torch.rand(parameter.shape).to(parameter.dtype)
    _save(model, path)
    (path / "preprocessor_config.json").write_text('{"patch_size": 4}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


def _save(model: Any, path: Path, router_bias: bool = True, save: dict[str, Any] | None = None) -> Path:
    for module in model.modules():
        bias = getattr(module, "e_score_correction_bias", None)
        if isinstance(bias, torch.Tensor) and router_bias:
            bias.data = 0.1 * torch.rand(bias.shape)
    model.save_pretrained(path, **(save or {}))
    _byte_tokenizer().save_pretrained(path)
    written = json.loads((path / "config.json").read_text())
    written["architectures"] = [_HUB_ARCHITECTURES.get(name, name) for name in written["architectures"]]
    (path / "config.json").write_text(json.dumps(written))
    return path


def add_mtp_layer(path: Path, new: str = f"model.layers.{NUM_LAYERS}.") -> list[str]:
    """Adds a layer for multi-token prediction, with experts of its own, as `new`; returns its names."""
    tensors = load_file(path / "model.safetensors")
    last = f"model.layers.{NUM_LAYERS - 1}."
    added = {new + name.removeprefix(last): tensor.clone() for name, tensor in tensors.items() if name.startswith(last)}
    # DeepSeek's names lie in the layer, Qwen's beside the model.
    prefix, projection, norms = new, "eh_proj", ("enorm", "hnorm", "shared_head.norm")
    if new.startswith("mtp."):
        prefix, projection, norms = "mtp.", "fc", ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    for name in norms:
        added[f"{prefix}{name}.weight"] = torch.ones(HIDDEN_SIZE, dtype=torch.bfloat16)
    added[f"{prefix}{projection}.weight"] = torch.ones(HIDDEN_SIZE, 2 * HIDDEN_SIZE, dtype=torch.bfloat16)
    save_file({**tensors, **added}, path / "model.safetensors", {"format": "pt"})
    return sorted(added)


def by_expert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with a matrix `...experts.{id}.{projection}.weight` for each that lies in a three-dimensional tensor."""
    return {name: view.contiguous() for name, view in expert_views(tensors).items()}


def expert_views(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As `by_expert`, but what is written to a matrix is written to the tensor that it lies in."""
    split = {}
    for name, tensor in tensors.items():
        suffix = next((suffix for suffix in _FUSED if name.endswith(f".{suffix}") and tensor.ndim == 3), None)
        if suffix is None:
            split[name] = tensor
            continue
        block = name.removesuffix(suffix)
        # Rows of 2 * 40 or 96; whatever has them last is transposed.
        rows = 2 * INTERMEDIATE_SIZE if len(_FUSED[suffix]) == 2 else HIDDEN_SIZE
        whole = tensor if tensor.shape[1] == rows else tensor.mT
        for projection, part in zip(_FUSED[suffix], whole.chunk(len(_FUSED[suffix]), dim=1), strict=True):
            split.update({f"{block}experts.{e}.{projection}.weight": part[e] for e in range(NUM_EXPERTS)})
    return split


def first_of_each_kind(tensors: dict[str, torch.Tensor]) -> set[str]:
    """One name of each kind of tensor outside the experts, whatever the layer."""
    kinds: dict[str, str] = {}
    for name in sorted(by_expert(tensors)):
        if ".experts." not in name:
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), name)
    return set(kinds.values())


def remove_tensors(path: Path, names: set[str]) -> None:
    """From the shards of a checkpoint and from its index, as if they had never been there."""
    index = json.loads((path / "model.safetensors.index.json").read_text())
    for shard in {index["weight_map"].pop(name) for name in names}:
        tensors = {name: tensor for name, tensor in load_file(path / shard).items() if name not in names}
        save_file(tensors, path / shard, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"<bos>": 256, "<eos>": 257, "<pad>": 258}
    tokenizer = Tokenizer(models.BPE(vocab={**{c: i for i, c in enumerate(alphabet)}, **special}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def dated_text(count: int) -> str:
    """A text to calibrate on, of so many clauses."""
    return "".join(f"{i * i % 977} apples, {i % 89} pears and the {i % 13}th of May; " for i in range(count))


def short_text(count: int) -> str:
    """The same with clauses of about half the length."""
    return "".join(f"{i * i % 977} apples and {i % 89} pears; " for i in range(count))
