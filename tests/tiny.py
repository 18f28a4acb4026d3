"""Tiny checkpoints of every supported family, in the layout of the hub: one 2-D tensor per expert matrix."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

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
}


def build_tiny(family: str, path: Path, **overrides: Any) -> Path:
    """Writes a tiny random checkpoint with a byte-level tokenizer; returns `path`."""
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **overrides})
    torch.manual_seed(len(family))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    _byte_tokenizer().save_pretrained(path)
    return path


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"<bos>": 256, "<eos>": 257, "<pad>": 258}
    tokenizer = Tokenizer(models.BPE(vocab={**{c: i for i, c in enumerate(alphabet)}, **special}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
