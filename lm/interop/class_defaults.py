"""Defaults of `transformers` 5 configuration classes for keys missing in config.json, and aliases.

By `model_type`; what is missing here is null or false there, or follows from other values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Defaults = dict[str, Any]

_BERT: Defaults = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True,
}
_BART: Defaults = {
    "vocab_size": 50265,
    "max_position_embeddings": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_layers": 12,
    "decoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "activation_function": "gelu",
    "d_model": 1024,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "scale_embedding": False,
}
_T5: Defaults = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}
_MT5: Defaults = _T5 | {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
_MT5 |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
_LLAMA: Defaults = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
_MISTRAL: Defaults = _LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
_QWEN2: Defaults = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN_MOE: Defaults = _QWEN2 | {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}
_GRANITE: Defaults = _LLAMA | {"embedding_multiplier": 1.0, "logits_scaling": 1.0}
_GRANITE |= {"residual_multiplier": 1.0, "attention_multiplier": 1.0}
_OLMO: Defaults = _LLAMA | {"vocab_size": 50304, "rms_norm_eps": 1e-5}
_GEMMA: Defaults = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "intermediate_size": 24576,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
}
_GEMMA2: Defaults = _GEMMA | {
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 9216,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_DEEPSEEK_V2: Defaults = _LLAMA | {
    "vocab_size": 102400,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "moe_intermediate_size": 1407,
}

CLASS_DEFAULTS: Mapping[str, Defaults] = {
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    "bert": _BERT,
    "roberta": _BERT | {"vocab_size": 50265, "pad_token_id": 1},
    "electra": _BERT
    | {"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4}
    | {"intermediate_size": 1024},
    "modernbert": {
        "vocab_size": 50368,
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "hidden_activation": "gelu",
        "max_position_embeddings": 8192,
        "norm_eps": 1e-5,
        "norm_bias": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "local_attention": 128,
        "embedding_dropout": 0.0,
        "mlp_bias": False,
        "mlp_dropout": 0.0,
        "classifier_pooling": "cls",
        "classifier_bias": False,
        "tie_word_embeddings": True,
    },
    "deberta-v2": _BERT
    | {"vocab_size": 128100, "hidden_size": 1536, "num_hidden_layers": 24}
    | {"num_attention_heads": 24, "intermediate_size": 6144, "type_vocab_size": 0}
    | {"layer_norm_eps": 1e-7, "relative_attention": False, "position_biased_input": True}
    | {"max_relative_positions": -1, "pooler_hidden_act": "gelu"},
    "bart": _BART,
    "mbart": _BART,
    "whisper": {
        "vocab_size": 51865,
        "num_mel_bins": 80,
        "encoder_layers": 4,
        "encoder_ffn_dim": 1536,
        "encoder_attention_heads": 6,
        "decoder_layers": 4,
        "decoder_ffn_dim": 1536,
        "decoder_attention_heads": 6,
        "activation_function": "gelu",
        "d_model": 384,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "scale_embedding": False,
        "max_source_positions": 1500,
        "max_target_positions": 448,
        "tie_word_embeddings": True,
        "begin_suppress_tokens": (220, 50256),
    },
    "t5": _T5,
    "mt5": _MT5,
    "umt5": _MT5,
    "llama": _LLAMA,
    "mistral": _MISTRAL | {"sliding_window": 4096},
    "mixtral": _MISTRAL
    | {"rms_norm_eps": 1e-5, "num_experts_per_tok": 2, "num_local_experts": 8}
    | {"router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0},
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128},
    "qwen2_moe": _QWEN_MOE
    | {"intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16}
    | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
    | {"num_experts_per_tok": 4, "qkv_bias": True},
    "qwen3_moe": _QWEN_MOE
    | {"intermediate_size": 6144, "num_key_value_heads": 4, "moe_intermediate_size": 768}
    | {"num_experts_per_tok": 8},
    "qwen3_next": _QWEN_MOE
    | {"intermediate_size": 5632, "num_hidden_layers": 48, "num_attention_heads": 16}
    | {"num_key_value_heads": 2, "head_dim": 256, "moe_intermediate_size": 512}
    | {"shared_expert_intermediate_size": 512, "num_experts": 512, "num_experts_per_tok": 10}
    | {"norm_topk_prob": True, "linear_conv_kernel_dim": 4}
    | {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    | {"linear_num_key_heads": 16, "linear_num_value_heads": 32},
    "olmo2": _OLMO,
    "olmo3": _OLMO | {"sliding_window": 4096},
    "olmoe": _OLMO
    | {"hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16}
    | {"num_attention_heads": 16, "max_position_embeddings": 4096}
    | {"num_experts_per_tok": 8, "router_aux_loss_coef": 0.01, "norm_topk_prob": False},
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2
    | {"vocab_size": 262208, "max_position_embeddings": 131072}
    | {"final_logit_softcapping": None, "attn_logit_softcapping": None},
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_V2
    | {"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432}
    | {"moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128}
    | {"num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256}
    | {"routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8}
    | {"first_k_dense_replace": 3, "norm_topk_prob": True, "max_position_embeddings": 4096}
    | {"rope_interleave": True, "topk_method": "noaux_tc"},
    "gpt_oss": {
        "num_hidden_layers": 36,
        "num_local_experts": 128,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "sliding_window": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "num_experts_per_tok": 4,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
    },
    "llama4_text": {
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "num_experts_per_tok": 1,
        "num_local_experts": 16,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    "smollm3": _LLAMA
    | {"vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36}
    | {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 32768}
    | {"use_sliding_window": False, "no_rope_layer_interval": 4, "tie_word_embeddings": True},
    "granite": _GRANITE,
    "granitemoe": _GRANITE
    | {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001},
    "phi3": _LLAMA
    | {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192}
    | {"resid_pdrop": 0.0, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    | {"original_max_position_embeddings": 4096},
    "stablelm": _LLAMA
    | {"vocab_size": 50304, "intermediate_size": 6912, "hidden_size": 2560}
    | {"num_key_value_heads": 32, "max_position_embeddings": 4096, "layer_norm_eps": 1e-5}
    | {"use_qkv_bias": False, "qk_layernorm": False, "use_parallel_residual": False}
    | {"hidden_dropout": 0.0},
    "mamba2": {
        "num_heads": 128,
        "head_dim": 64,
        "vocab_size": 32768,
        "hidden_size": 4096,
        "state_size": 128,
        "num_hidden_layers": 64,
        "layer_norm_epsilon": 1e-5,
        "expand": 2,
        "conv_kernel": 4,
        "n_groups": 8,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "chunk_size": 256,
        "tie_word_embeddings": False,
    },
    "bamba": _MISTRAL
    | {"vocab_size": 128000, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5}
    | {"mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_n_groups": 1}
    | {"mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256}
    | {"mamba_conv_bias": True, "mamba_proj_bias": False},
}

_SIZES = {"hidden_size": "d_model", "num_attention_heads": "num_heads"}
_OF_T5 = _SIZES | {"num_hidden_layers": "num_layers", "head_dim": "d_kv"}
_OF_BART = _SIZES | {"num_attention_heads": "encoder_attention_heads"}
_OF_BART |= {"num_hidden_layers": "encoder_layers"}
_EXPERTS = {"num_experts": "num_local_experts"}
# Further names of keys (`attribute_map` there), of families that do not read both themselves.
ALIASES: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    **dict.fromkeys(("t5", "mt5", "umt5"), _OF_T5),
    **dict.fromkeys(("bart", "mbart", "whisper"), _OF_BART),
    **dict.fromkeys(("mixtral", "gpt_oss"), _EXPERTS),
    "deepseek_v2": {"num_experts": "n_routed_experts"},
    "deepseek_v3": {"num_local_experts": "n_routed_experts"},
}
