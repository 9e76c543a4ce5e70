"""A tiny config of every family, with layer types mixed, windows short, and every scale and cap off its default.

Fields beside these are those of `conftest.SHARED`, with a width of 32.
"""

WINDOW = 5  # shorter than the sequences that the tests use
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
GRANITE = {
    "embedding_multiplier": 1.9, "residual_multiplier": 0.37, "logits_scaling": 1.3, "attention_multiplier": 0.21,
}  # fmt: skip
MIXTRAL = {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "routed_scaling_factor": 1.9, "n_group": 2, "topk_group": 1,
}  # fmt: skip
LINEAR = {
    "linear_conv_kernel_dim": 3, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4,
    "num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3, "head_dim": 8, "intermediate_size": 48,
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention"]
DENSE = {"intermediate_size": 48}
GEMMA = {
    **DENSE, "head_dim": 12, "query_pre_attn_scalar": 7, "final_logit_softcapping": 1.9, "attn_logit_softcapping": 0.8,
    "sliding_window": WINDOW, "layer_types": SLIDING,
}  # fmt: skip

MOE = {
    "afmoe": {
        "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "num_shared_experts": 1, "route_scale": 1.9, "mup_enabled": True, "num_dense_layers": 1, "head_dim": 8,
        "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
    },
    "aria_text": {"intermediate_size": 16, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": {**DEEPSEEK, **MLA, "mlp_layer_types": ["dense", "sparse"]},
    "bailing_hybrid": {
        **{k: v for k, v in DEEPSEEK.items() if k != "n_routed_experts"}, **MLA, "num_local_experts": 4, "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"], "short_conv_kernel_size": 3,
    },
    "cohere2_moe": {
        "intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1, "head_dim": 8,
        "logit_scale": 0.37, "sliding_window": WINDOW, "layer_types": SLIDING, "mlp_layer_types": ["dense", "sparse"],
        "prefix_dense_intermediate_size": 48, "rms_norm_eps": None,
    },
    "deepseek_v2": {**DEEPSEEK, **MLA, "topk_method": "group_limited_greedy", "first_k_dense_replace": 1},
    "deepseek_v3": {**DEEPSEEK, **MLA, "first_k_dense_replace": 1},
    "dots1": {
        **DEEPSEEK, "first_k_dense_replace": 1, "head_dim": 8, "sliding_window": WINDOW, "layer_types": SLIDING,
    },
    "ernie4_5_moe": {
        "intermediate_size": 48, "moe_intermediate_size": 16, "moe_k": 2, "moe_num_experts": 4,
        "moe_num_shared_experts": 1, "use_bias": True,
    },
    "exaone_moe": {
        "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "num_shared_experts": 1, "routed_scaling_factor": 1.9, "sliding_window": WINDOW, "layer_types": SLIDING,
        "mlp_layer_types": ["dense", "sparse"], "n_group": 2, "topk_group": 1,
    },
    "flex_olmo": {"intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {**DEEPSEEK, "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True, "head_dim": 8},
    "glm4_moe_lite": {**DEEPSEEK, **MLA, "mlp_layer_types": ["dense", "sparse"]},
    "gpt_oss": {
        **MIXTRAL, "head_dim": 8, "sliding_window": WINDOW, "layer_types": SLIDING, "swiglu_alpha": 1.3,
        "swiglu_limit": 0.9,
    },
    "granitemoe": {**MIXTRAL, **GRANITE},
    "granitemoehybrid": {
        **MIXTRAL, **GRANITE, "shared_intermediate_size": 24, "mamba_n_heads": 4, "mamba_d_head": 16,
        "mamba_d_state": 8, "mamba_d_conv": 3, "mamba_chunk_size": 8, "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "position_embedding_type": "rope",
    },
    "granitemoeshared": {**MIXTRAL, **GRANITE, "shared_intermediate_size": 24},
    "hunyuan_v1_moe": {"intermediate_size": 16, "num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "hy_v3": {
        "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "router_scaling_factor": 1.9, "mlp_layer_types": ["dense", "sparse"], "head_dim": 8,
    },
    "jetmoe": {**MIXTRAL, "kv_channels": 8, "num_key_value_heads": 2, "num_attention_heads": 4},
    "laguna": {
        "intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "sliding_window": WINDOW, "layer_types": SLIDING, "head_dim": 8,
        "mlp_layer_types": ["dense", "sparse"], "moe_routed_scaling_factor": 1.9, "moe_router_logit_softcapping": 0.8,
        "num_attention_heads_per_layer": [4, 2],
    },
    "lfm2_moe": {
        "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.9, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"],
        "num_hidden_layers": 3,
    },
    "llama4_text": {
        "intermediate_size": 16, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1,
        "head_dim": 8, "interleave_moe_layer_step": 2, "attention_chunk_size": WINDOW, "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"], "floor_scale": 3, "attn_scale": 0.37,
    },
    "longcat_flash": {
        "num_layers": 2, "ffn_hidden_size": 48, **MLA, "head_dim": 8, "moe_topk": 3, "n_routed_experts": 4,
        "zero_expert_num": 2, "expert_ffn_hidden_size": 16, "routed_scaling_factor": 1.9,
    },
    "mellum": {
        "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "sliding_window": WINDOW, "layer_types": SLIDING, "mlp_layer_types": ["dense", "sparse"], "head_dim": 8,
    },
    "mimo_v2_flash": {
        **DEEPSEEK, "head_dim": 8, "v_head_dim": 4, "sliding_window": WINDOW, "layer_types": SLIDING,
        "mlp_layer_types": ["dense", "sparse"], "attention_value_scale": 0.37,
    },
    "minimax": {
        **MIXTRAL, "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_hidden_layers": 3,
        "block_size": 4, "full_attn_alpha_factor": 0.37, "full_attn_beta_factor": 1.9,
        "linear_attn_alpha_factor": 1.3, "linear_attn_beta_factor": 0.7, "mlp_alpha_factor": 1.7,
        "mlp_beta_factor": 0.6, "head_dim": 8,
    },
    "minimax_m2": {**MIXTRAL, "head_dim": 8},
    "mixtral": {**MIXTRAL, "sliding_window": WINDOW},
    "olmoe": {"intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.3},
    "phimoe": {**MIXTRAL, "sliding_window": WINDOW, "attention_bias": True, "lm_head_bias": True,
               "router_jitter_noise": 0.0},
    "qwen2_moe": {
        "intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 4,
        "num_experts_per_tok": 2, "mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": WINDOW,
        "layer_types": SLIDING,
    },
    "qwen3_5_moe_text": LINEAR,
    "qwen3_moe": {
        "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "head_dim": 12, "mlp_only_layers": [0],
    },
    "qwen3_next": {**LINEAR, "mlp_only_layers": [0]},
    "solar_open": {**DEEPSEEK, "head_dim": 8},
}  # fmt: skip
DENSE_FAMILIES = {
    "apertus": {**DENSE},
    "arcee": {**DENSE},
    "cohere": {**DENSE, "logit_scale": 0.37, "use_qk_norm": True},
    "cohere2": {**DENSE, "logit_scale": 0.37, "sliding_window": WINDOW, "layer_types": SLIDING},
    "ernie4_5": {**DENSE, "head_dim": 8, "use_bias": True},
    "exaone4": {**DENSE, "sliding_window": WINDOW, "layer_types": SLIDING},
    "gemma": {**DENSE, "head_dim": 12},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "glm": {**DENSE, "head_dim": 8},
    "glm4": {**DENSE, "head_dim": 8},
    "granite": {**DENSE, **GRANITE},
    "helium": {**DENSE, "head_dim": 8},
    "hunyuan_v1_dense": {**DENSE, "head_dim": 8},
    "llama": {**DENSE},
    "ministral3": {**DENSE, "head_dim": 8, "sliding_window": WINDOW},
    "mistral": {**DENSE, "sliding_window": WINDOW},
    "nemotron": {**DENSE},
    "olmo": {**DENSE, "clip_qkv": 0.3},
    "olmo2": {**DENSE},
    "olmo3": {**DENSE, "sliding_window": WINDOW, "layer_types": SLIDING},
    "phi3": {**DENSE, "sliding_window": WINDOW},
    "qwen2": {**DENSE, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": SLIDING},
    "qwen3": {**DENSE, "head_dim": 12, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": SLIDING},
    "seed_oss": {**DENSE, "head_dim": 8, "residual_dropout": 0.0, "attention_dropout": 0.0},
    "smollm3": {**DENSE, "no_rope_layers": [1, 0]},
    "stablelm": {**DENSE, "use_qkv_bias": True, "qk_layernorm": True},
    "starcoder2": {**DENSE, "sliding_window": WINDOW},
}
TINY = MOE | DENSE_FAMILIES
