"""Tiny configurations of models beyond those of tests/tiny.py, by their model_type in transformers.

`TEXT` is merged with what all tiny models have in common, and `MULTIMODAL` has that inside `text_config`.
"""

from typing import Any

from tests.tiny import FAMILIES, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOP_K

_QWEN: dict[str, Any] = {
    "moe_intermediate_size": INTERMEDIATE_SIZE,
    "num_experts": NUM_EXPERTS,
    "head_dim": 32,
    "norm_topk_prob": True,
}

_SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
_DENSE_FIRST = ["dense", "sparse", "sparse"]

# Latent attention has the sizes of the published models, as vLLM's kernel for CPUs wants them.
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 3,
    "q_lora_rank": 28,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 64,
    "v_head_dim": 24,
}

_DEEPSEEK: dict[str, Any] = {
    **_LATENT,
    "intermediate_size": 64,
    "moe_intermediate_size": INTERMEDIATE_SIZE,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
}

_GRANITE: dict[str, Any] = {
    "intermediate_size": INTERMEDIATE_SIZE,
    "shared_intermediate_size": 48,
    "num_local_experts": NUM_EXPERTS,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}

_RECURRENT: dict[str, Any] = {
    "layer_types": ["full_attention"] * 3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

TEXT: dict[str, dict[str, Any]] = {
    "afmoe": {
        **_QWEN,
        "intermediate_size": 64,
        "num_dense_layers": 1,
        "num_shared_experts": 1,
        "route_scale": 1.7,
        "layer_types": _SLIDING,
        "sliding_window": 128,
        "mup_enabled": True,
        # Of the remote code's config, and read by vLLM.
        "score_func": "sigmoid",
        "route_norm": True,
        "n_group": 1,
        "topk_group": 1,
    },
    "axk1": {**_DEEPSEEK, "first_k_dense_replace": 1},
    "cohere2_moe": {
        "intermediate_size": INTERMEDIATE_SIZE,
        "prefix_dense_intermediate_size": 64,
        "num_experts": NUM_EXPERTS,
        "num_shared_experts": 1,
        "expert_selection_fn": "sigmoid",
        "head_dim": 32,
        "layer_types": _SLIDING,
        "mlp_layer_types": _DENSE_FIRST,
        "sliding_window": 128,
        "tie_word_embeddings": True,
    },
    "dbrx": {
        "d_model": HIDDEN_SIZE,
        "n_heads": 3,
        "n_layers": 3,
        "max_seq_len": 256,
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 1, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": HIDDEN_SIZE,
            "ffn_hidden_size": INTERMEDIATE_SIZE,
            "moe_num_experts": NUM_EXPERTS,
            "moe_top_k": TOP_K,
        },
    },
    "deepseek_v32": {
        **_DEEPSEEK,
        "mlp_layer_types": _DENSE_FIRST,
        "first_k_dense_replace": 1,
        "index_topk": 64,
        "index_n_heads": 3,
    },
    "dots1": {
        "intermediate_size": 64,
        "moe_intermediate_size": INTERMEDIATE_SIZE,
        "n_routed_experts": NUM_EXPERTS,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.7,
        "norm_topk_prob": True,
        "head_dim": 32,
    },
    "exaone_moe": {
        **_QWEN,
        "intermediate_size": 64,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "mlp_layer_types": _DENSE_FIRST,
        "layer_types": _SLIDING,
        "sliding_window": 128,
        "sliding_window_pattern": 3,
        "routed_scaling_factor": 1.7,
    },
    "flex_olmo": {"intermediate_size": INTERMEDIATE_SIZE, "num_experts": NUM_EXPERTS, "num_key_value_heads": 3},
    "glm4_moe_lite": {**_DEEPSEEK, "mlp_layer_types": _DENSE_FIRST, "first_k_dense_replace": 1},
    "glm_moe_dsa": {
        **_DEEPSEEK,
        "mlp_layer_types": _DENSE_FIRST,
        "first_k_dense_replace": 1,
        "index_topk": 64,
        "index_n_heads": 3,
    },
    "gpt_oss": {
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_local_experts": NUM_EXPERTS,
        "head_dim": 32,
        "layer_types": _SLIDING,
        "sliding_window": 128,
    },
    "granitemoeshared": _GRANITE,
    "granitemoe_swa": {**_GRANITE, "layer_types": _SLIDING, "sliding_window": 128, "layer_rope_theta": [1e4] * 3},
    "hunyuan_v1_moe": {
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_experts": NUM_EXPERTS,
        "moe_topk": TOP_K,
        "head_dim": 32,
    },
    "hy_v3": {
        **_QWEN,
        "intermediate_size": 64,
        "num_shared_experts": 1,
        "mlp_layer_types": _DENSE_FIRST,
        "first_k_dense_replace": 1,
        # Of the remote code's config, and read by vLLM.
        "expert_hidden_dim": INTERMEDIATE_SIZE,
        "route_norm": True,
        "qk_norm": True,
        "router_scaling_factor": 1.7,
    },
    "jamba": {
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_experts": NUM_EXPERTS,
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
    },
    "laguna": {
        **_QWEN,
        "intermediate_size": 64,
        "shared_expert_intermediate_size": 48,
        "num_attention_heads_per_layer": [3, 3, 3],
        "layer_types": _SLIDING,
        "sliding_window": 128,
        "mlp_layer_types": _DENSE_FIRST,
        "moe_routed_scaling_factor": 1.7,
    },
    "lfm2_moe": {
        **_QWEN,
        "intermediate_size": 64,
        "num_dense_layers": 1,
        "layer_types": ["full_attention"] * 3,
        "tie_word_embeddings": True,
    },
    "longcat_flash": {
        **_LATENT,
        "num_layers": 2,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": INTERMEDIATE_SIZE,
        "n_routed_experts": NUM_EXPERTS,
        "zero_expert_num": 4,
        # Of the remote code's config, and read by vLLM.
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "moe_topk": TOP_K,
        "routed_scaling_factor": 1.7,
        "head_dim": 64,
    },
    "mellum": {
        **{**_QWEN, "num_experts": None},
        "num_local_experts": NUM_EXPERTS,
        "layer_types": _SLIDING,
        "sliding_window": 128,
        "mlp_layer_types": ["sparse"] * 3,
    },
    "mimo_v2_flash": {
        "intermediate_size": 64,
        "moe_intermediate_size": INTERMEDIATE_SIZE,
        "n_routed_experts": NUM_EXPERTS,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "head_dim": 32,
        "v_head_dim": 32,
        "layer_types": _SLIDING,
        "sliding_window": 128,
        "mlp_layer_types": _DENSE_FIRST,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
            for kind in ("full_attention", "sliding_attention")
        },
        # Of the remote code's config, and read by vLLM.
        "hybrid_layer_pattern": [1, 1, 0],
        "moe_layer_freq": [0, 1, 1],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 32,
        "swa_v_head_dim": 32,
        "sliding_window_size": 128,
        "add_swa_attention_sink_bias": True,
        "rope_theta": 10000.0,
        "swa_rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "layernorm_epsilon": 1e-5,
    },
    "mistral4": {**_DEEPSEEK, "kv_lora_rank": 512, "first_k_dense_replace": 0, "n_group": 1},
    "nemotron_h": {
        "layers_block_type": ["full_attention", "moe", "full_attention", "moe", "mlp"],
        "intermediate_size": 64,
        "moe_intermediate_size": INTERMEDIATE_SIZE,
        "moe_shared_expert_intermediate_size": 48,
        "n_routed_experts": NUM_EXPERTS,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.7,
        "head_dim": 32,
        "use_mamba_kernels": False,
        "mamba_num_heads": 6,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 2,
    },
    "gemma4_text": {
        "intermediate_size": 64,
        "moe_intermediate_size": INTERMEDIATE_SIZE,
        "num_experts": NUM_EXPERTS,
        "top_k_experts": TOP_K,
        "enable_moe_block": True,
        "head_dim": 32,
        "global_head_dim": 64,
        "layer_types": _SLIDING,
        "sliding_window": 128,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 259,
        "tie_word_embeddings": True,
    },
    "qwen3_5_moe_text": {**_QWEN, **_RECURRENT, "shared_expert_intermediate_size": 48},
    "solar_open": {
        "moe_intermediate_size": INTERMEDIATE_SIZE,
        "n_routed_experts": NUM_EXPERTS,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.7,
        "norm_topk_prob": True,
        "head_dim": 32,
    },
}

# A tower that sees, as most transformers of images call its sizes.
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": HIDDEN_SIZE,
}

_QWEN_TOKENS = {
    "image_token_id": 250,
    "video_token_id": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}

_QWEN_VL_TEXT: dict[str, Any] = {
    **{key: value for key, value in _QWEN.items() if key != "num_experts"},
    "intermediate_size": 64,
    "num_local_experts": NUM_EXPERTS,
    "rope_parameters": _MROPE,
}

_GEMMA_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
}
_GEMMA_TOKENS = {"boi_token_id": 250, "eoi_token_id": 251, "image_token_id": 252, "video_token_id": 253}

MULTIMODAL: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": {
        "text_config": {**TEXT["qwen3_5_moe_text"], "rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
        "vision_config": {**_VISION, "num_position_embeddings": 64},
        **_QWEN_TOKENS,
    },
    "qwen3_vl_moe": {
        "text_config": _QWEN_VL_TEXT,
        "vision_config": {**_VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        **_QWEN_TOKENS,
    },
    "llama4": {
        "text_config": FAMILIES["llama4_text"],
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "vision_output_dim": 48,
            "image_size": 16,
            "patch_size": 4,
            "projector_input_dim": 48,
            "projector_output_dim": 48,
        },
        "boi_token_index": 250,
        "eoi_token_index": 251,
        "image_token_index": 252,
    },
    "aria": {
        "text_config": {
            "model_type": "aria_text",
            "intermediate_size": INTERMEDIATE_SIZE,
            "moe_num_experts": NUM_EXPERTS,
            "moe_topk": TOP_K,
            "moe_num_shared_experts": 1,
            "head_dim": 32,
        },
        "vision_config": {
            "model_type": "idefics3_vision",
            **_TOWER,
        },
        "projector_patch_to_query_dict": {"16": 4},
        "image_token_index": 252,
    },
    "gemma4": {"text_config": TEXT["gemma4_text"], "vision_config": _GEMMA_VISION, **_GEMMA_TOKENS},
    "glm4v_moe": {
        "text_config": {
            "intermediate_size": 64,
            "moe_intermediate_size": INTERMEDIATE_SIZE,
            "n_routed_experts": NUM_EXPERTS,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.7,
            "head_dim": 32,
            "use_qk_norm": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {**_VISION, "image_size": 16},
        "image_token_id": 250,
        "video_token_id": 251,
        "image_start_token_id": 252,
        "image_end_token_id": 253,
        "video_start_token_id": 254,
        "video_end_token_id": 255,
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "intermediate_size": 64,
            "moe_intermediate_size": [INTERMEDIATE_SIZE, 24],
            "moe_num_experts": NUM_EXPERTS,
            "moe_k": TOP_K,
            "moe_num_shared_experts": 1,
            "mlp_layer_types": _DENSE_FIRST,
            "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 6, 4]},
        },
        "vision_config": {key: value for key, value in _VISION.items() if key not in ("temporal_patch_size",)},
        "image_token_id": 250,
        "video_token_id": 251,
    },
    "kimi_k25": {
        "text_config": {**_DEEPSEEK, "first_k_dense_replace": 1},
        "vision_config": {
            "patch_size": 4,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
        },
        "projection_hidden_size": 32,
        "image_token_id": 250,
        "video_token_id": 251,
    },
    "minimax_m3_vl": {
        "text_config": {
            "intermediate_size": INTERMEDIATE_SIZE,
            "dense_intermediate_size": 64,
            "shared_intermediate_size": INTERMEDIATE_SIZE,
            "num_local_experts": NUM_EXPERTS,
            "head_dim": 32,
            "rotary_dim": 16,
            "mlp_layer_types": _DENSE_FIRST,
            "layer_types": ["full_attention"] * 3,
            "index_n_heads": 1,
            "index_head_dim": 32,
        },
        "vision_config": _TOWER,
        "image_token_index": 250,
        "video_token_index": 251,
        "projector_hidden_size": 96,
        "merged_hidden_size": 384,
    },
    "step3p7": {
        "text_config": {
            "intermediate_size": 64,
            "moe_intermediate_size": INTERMEDIATE_SIZE,
            "share_expert_dim": 48,
            "n_routed_experts": NUM_EXPERTS,
            "head_dim": 32,
            "mlp_layer_types": _DENSE_FIRST,
            "layer_types": ["full_attention"] * 3,
            "moe_router_scaling_factor": 1.7,
        },
        "vision_config": _TOWER,
        "image_token_id": 250,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral4", **TEXT["mistral4"]},
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": 16,
            "patch_size": 4,
        },
        "image_token_index": 250,
    },
    "qwen3_omni_moe": {
        "thinker_config": {
            "text_config": {**_QWEN_VL_TEXT, "num_experts": NUM_EXPERTS},
            "vision_config": {
                **_VISION,
                "image_size": 16,
                "apply_vit_abs_pos_embed": True,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1],
            },
            "audio_config": {
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 48,
                "d_model": 32,
                "output_dim": HIDDEN_SIZE,
                "num_mel_bins": 16,
                "downsample_hidden_size": 16,
            },
            "audio_token_id": 249,
            "image_token_id": 250,
            "video_token_id": 251,
            "vision_start_token_id": 252,
            "vision_end_token_id": 253,
            "audio_start_token_id": 254,
        },
        "enable_audio_output": False,
    },
}
