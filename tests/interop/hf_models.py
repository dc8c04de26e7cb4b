"""Small random models of `transformers`, one of every kind that can be read."""

import copy

import pytest

safetensors = pytest.importorskip("safetensors.numpy")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY = 96
CHUNKED = "chunked_attention"
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
BERT = {**LLAMA, "num_attention_heads": 2, "pad_token_id": 0}
ROBERTA = {**BERT, "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
MODERNBERT = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "local_attention": 6,
    "max_position_embeddings": 64,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
    **dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id"), 0),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
}
ELECTRA = BERT | {"embedding_size": 20, "hidden_size": 32}
DEBERTA = BERT | {
    "position_buckets": 6,
    "relative_attention": True,
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "type_vocab_size": 0,
    "max_position_embeddings": 20,
}
GPT2 = {
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 3,
    "n_positions": 40,
    "vocab_size": VOCABULARY,
    "bos_token_id": None,
    "eos_token_id": None,
}
T5 = {
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 56,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
BART = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 28,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ALL_ROPE = YARN_ROPE | {
    "beta_fast": 3.0,
    "beta_slow": 0.5,
    "mscale": 2.0,
    "mscale_all_dim": 0.7,
    "truncate": False,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "short_factor": [1.0, 1.05, 1.2, 1.5],
    "long_factor": [1.0, 2.0, 5.0, 7.5],
    "original_max_position_embeddings": 12,
}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0}

MIXTRAL = LLAMA | {"num_local_experts": 4, "num_key_value_heads": 2}
OLMO3 = LLAMA | {
    "num_hidden_layers": 4,
    "sliding_window": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {
        "full_attention": YARN_ROPE,
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    },
}
MOE_WIDTHS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QWEN2_MOE = LLAMA | MOE_WIDTHS | {"num_key_value_heads": 2, "shared_expert_intermediate_size": 40}
QWEN3_MOE = LLAMA | MOE_WIDTHS | {"num_key_value_heads": 2, "norm_topk_prob": True, "head_dim": 10}
GEMMA = LLAMA | {"num_key_value_heads": 1, "head_dim": 10, "pad_token_id": None}
GEMMA2 = GEMMA | {
    "sliding_window": 4,
    "query_pre_attn_scalar": 12,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 2.0,
}
GEMMA3 = GEMMA | {
    "num_hidden_layers": 5,
    "sliding_window": 4,
    "query_pre_attn_scalar": 7,
    "attn_logit_softcapping": 3.0,  # which transformers does not apply
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
}

# name: (their class, what its configuration says)
DECODERS = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied-wide": (
        "GPT2LMHeadModel",
        GPT2 | {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu"},
    ),
    "gpt2-unscaled": ("GPT2LMHeadModel", GPT2 | {"scale_attn_weights": False}),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-grouped-tied": (
        "LlamaForCausalLM",
        LLAMA | {"num_key_value_heads": 2, "head_dim": 6, "tie_word_embeddings": True},
    ),
    "llama-biases": (
        "LlamaForCausalLM",
        LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    ),
    "llama-attention-biases": ("LlamaForCausalLM", LLAMA | {"attention_bias": True}),
    "llama-3.1": ("LlamaForCausalLM", LLAMA | {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear": ("LlamaForCausalLM", LLAMA | {"rope_parameters": LINEAR_ROPE}),
    "llama-yarn": ("LlamaForCausalLM", LLAMA | {"rope_parameters": YARN_ROPE}),
    "llama-longrope": ("LlamaForCausalLM", LLAMA | {"rope_parameters": LONG_ROPE}),
    "llama-dynamic": (
        "LlamaForCausalLM",
        LLAMA | {"rope_parameters": DYNAMIC_ROPE, "max_position_embeddings": 12},
    ),
    "mistral": (
        "MistralForCausalLM",
        LLAMA | {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 12},
    ),
    "mistral-window": (
        "MistralForCausalLM",
        LLAMA | {"num_key_value_heads": 1, "sliding_window": 5, "rope_parameters": LINEAR_ROPE},
    ),
    "mixtral": ("MixtralForCausalLM", MIXTRAL),
    "mixtral-one-expert": (
        "MixtralForCausalLM",
        MIXTRAL | {"num_experts_per_tok": 1, "num_hidden_layers": 1},
    ),
    "mixtral-window-3-of-5": (
        "MixtralForCausalLM",
        MIXTRAL
        | {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 6, "head_dim": 6}
        | {"tie_word_embeddings": True},
    ),
    "gemma": ("GemmaForCausalLM", GEMMA),
    "gemma2": ("Gemma2ForCausalLM", GEMMA2),
    "gemma2-global": ("Gemma2ForCausalLM", GEMMA2 | {"layer_types": ["full_attention"] * 3}),
    "gemma3": ("Gemma3ForCausalLM", GEMMA3),
    "gemma3-local-biases": (
        "Gemma3ForCausalLM",
        GEMMA3
        | {"num_hidden_layers": 2, "layer_types": None, "final_logit_softcapping": 2.0}
        | {"attention_bias": True, "tie_word_embeddings": False, "num_key_value_heads": 2},
    ),
    "qwen2-windows": (
        "Qwen2ForCausalLM",
        LLAMA
        | {"num_key_value_heads": 2, "use_sliding_window": True}
        | {"sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen2-yarn": (
        "Qwen2ForCausalLM",
        LLAMA | {"num_key_value_heads": 2, "rope_parameters": YARN_ALL_ROPE},
    ),
    "gemma-longrope": (
        "GemmaForCausalLM",
        GEMMA | {"rope_parameters": LONG_ROPE | {"attention_factor": 1.7}, "head_dim": 8},
    ),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"num_key_value_heads": 2, "head_dim": 10}),
    "qwen3-biases": (
        "Qwen3ForCausalLM",
        LLAMA | {"head_dim": 6, "attention_bias": True, "num_key_value_heads": 4},
    ),
    "olmo2": (
        "Olmo2ForCausalLM",
        LLAMA | {"num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "olmo3": ("Olmo3ForCausalLM", OLMO3),
    "olmoe": (
        "OlmoeForCausalLM",
        LLAMA
        | {"num_key_value_heads": 2, "num_experts": 5, "num_experts_per_tok": 3, "clip_qkv": 0.5},
    ),
    "qwen2-moe": ("Qwen2MoeForCausalLM", QWEN2_MOE),
    "qwen2-moe-plain-layers": (
        "Qwen2MoeForCausalLM",
        QWEN2_MOE
        | {"num_hidden_layers": 4, "mlp_only_layers": [0, 2], "norm_topk_prob": True}
        | {"use_sliding_window": True, "sliding_window": 5, "qkv_bias": False}
        | {"num_experts_per_tok": 1, "tie_word_embeddings": True},
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", QWEN3_MOE),
    "qwen3-moe-dense-first": (
        "Qwen3MoeForCausalLM",
        QWEN3_MOE
        | {"mlp_only_layers": [0], "norm_topk_prob": False, "num_experts_per_tok": 4}
        | {"attention_bias": True, "use_sliding_window": True, "sliding_window": 4},
    ),
}
# Weights of V3 are read whatever its rotated pairs, and its bias of the router is no parameter.
DEEPSEEK = LLAMA | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
}
DECODERS |= {
    "deepseek-v2-lite": ("DeepseekV2ForCausalLM", DEEPSEEK | {"q_lora_rank": None}),
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        DEEPSEEK
        | {"q_lora_rank": 14, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
        | {"routed_scaling_factor": 16.0, "n_shared_experts": 1, "v_head_dim": 12}
        | {"rope_parameters": YARN_ALL_ROPE, "first_k_dense_replace": 0, "mlp_bias": True},
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        DEEPSEEK
        | {"q_lora_rank": 14, "n_group": 4, "topk_group": 2, "n_shared_experts": 2}
        | {"rope_parameters": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek-v3-halves": (
        "DeepseekV3ForCausalLM",
        DEEPSEEK
        | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
        | {"rope_interleave": False, "attention_bias": True, "num_hidden_layers": 4}
        | {"tie_word_embeddings": True, "first_k_dense_replace": 2, "num_key_value_heads": 2}
        | {"num_attention_heads": 2},
    ),
    "deepseek-v3-dense": (
        "DeepseekV3ForCausalLM",
        DEEPSEEK | {"q_lora_rank": 14, "first_k_dense_replace": 3},
    ),
}
GPT_OSS = LLAMA | {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 4,
}
LLAMA4 = LLAMA | {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 24,
    "intermediate_size_mlp": 40,
    "num_local_experts": 4,
    "attention_chunk_size": 5,
    "floor_scale": 3,
    "rope_parameters": LLAMA3_ROPE | {"high_freq_factor": 1.0},
}
GRANITE = LLAMA | {
    "num_key_value_heads": 2,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 3.0,
}
PHI3 = LLAMA | {"num_key_value_heads": 2, "pad_token_id": None}
DECODERS |= {
    "gpt-oss": ("GptOssForCausalLM", GPT_OSS),
    "gpt-oss-plain": (
        "GptOssForCausalLM",
        GPT_OSS
        | {"layer_types": ["full_attention"], "num_hidden_layers": 1, "num_local_experts": 2}
        | {"num_experts_per_tok": 1, "rope_parameters": YARN_ALL_ROPE}
        | {"attention_bias": False, "tie_word_embeddings": True},
    ),
    "llama4": ("Llama4ForCausalLM", LLAMA4),
    "llama4-irregular": (
        "Llama4ForCausalLM",
        LLAMA4
        | {"use_qk_norm": False, "num_experts_per_tok": 2}
        | {"attention_bias": True, "tie_word_embeddings": True, "attn_temperature_tuning": False}
        | {"no_rope_layers": [1, 0, 0, 1], "rope_parameters": None, "hidden_act": "gelu"}
        | {"moe_layers": [0, 1, 3], "layer_types": [*[CHUNKED] * 2, *["full_attention"] * 2]},
    ),
    "smollm3": (
        "SmolLM3ForCausalLM",
        LLAMA
        | {"num_hidden_layers": 5, "num_key_value_heads": 2, "pad_token_id": None}
        | {"rope_parameters": YARN_ALL_ROPE, "attention_bias": True, "mlp_bias": True}
        | {"tie_word_embeddings": False, "no_rope_layer_interval": 2},
    ),
    "granite": ("GraniteForCausalLM", GRANITE),
    "granite-tied-biases": (
        "GraniteForCausalLM",
        GRANITE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "granite-moe": (
        "GraniteMoeForCausalLM",
        GRANITE | {"num_local_experts": 5, "num_experts_per_tok": 3, "attention_bias": True},
    ),
    "phi3-window": ("Phi3ForCausalLM", PHI3 | {"sliding_window": 5}),
    "phi3-partial-longrope": (
        "Phi3ForCausalLM",
        PHI3
        | {"partial_rotary_factor": 0.5, "tie_word_embeddings": True, "hidden_size": 64}
        | {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 12},
    ),
    "stablelm": (
        "StableLmForCausalLM",
        LLAMA
        | {"num_key_value_heads": 2, "use_qkv_bias": True}
        | {"use_parallel_residual": True, "qk_layernorm": True},
    ),
    "stablelm-whole-tied": (
        "StableLmForCausalLM",
        LLAMA
        | {"partial_rotary_factor": 1.0, "use_qkv_bias": False, "tie_word_embeddings": True}
        | {"num_key_value_heads": 4, "layer_norm_eps": 1e-3, "hidden_act": "relu"},
    ),
}
ENCODERS = {
    "bert": ("BertForMaskedLM", BERT),
    "bert-untied-tanh": (
        "BertForMaskedLM",
        BERT | {"tie_word_embeddings": False, "hidden_act": "gelu_new"},
    ),
    "bert-pretraining": ("BertForPreTraining", BERT),
    "deberta": ("DebertaV2ForMaskedLM", DEBERTA),
    "deberta-types-untied": (
        "DebertaV2ForMaskedLM",
        DEBERTA
        | {"type_vocab_size": 2, "tie_word_embeddings": False, "position_buckets": -1}
        | {"max_relative_positions": 9, "num_attention_heads": 4, "hidden_act": "gelu_new"}
        | {"share_att_key": False, "norm_rel_ebd": "none", "pos_att_type": ["p2c"]}
        | {"conv_kernel_size": 3, "conv_act": "gelu"}
        | {"position_biased_input": True, "embedding_size": 20},
    ),
    "deberta-no-terms": (
        "DebertaV2ForMaskedLM",
        DEBERTA | {"pos_att_type": None, "position_biased_input": True, "embedding_size": 20},
    ),
    "deberta-absolute": (
        "DebertaV2ForMaskedLM",
        DEBERTA
        | {"relative_attention": False, "position_biased_input": True, "norm_rel_ebd": "none"},
    ),
    "electra-generator": ("ElectraForMaskedLM", ELECTRA),
    "electra-generator-untied": (
        "ElectraForMaskedLM",
        ELECTRA | {"embedding_size": 24, "hidden_size": 24, "tie_word_embeddings": False},
    ),
    "modernbert": ("ModernBertForMaskedLM", MODERNBERT),
    "modernbert-biases": (
        "ModernBertForMaskedLM",
        MODERNBERT
        | {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}
        | {"num_hidden_layers": 3, "global_attn_every_n_layers": 2, "local_attention": 3}
        | {"tie_word_embeddings": False, "num_attention_heads": 2}
        | {"hidden_activation": "silu", "classifier_activation": "relu"},
    ),
    "modernbert-global": (
        "ModernBertForMaskedLM",
        MODERNBERT | {"layer_types": ["full_attention"] * 5, "hidden_size": 40},
    ),
    "roberta": ("RobertaForMaskedLM", ROBERTA),
    "roberta-types": (
        "RobertaForMaskedLM",
        ROBERTA | {"type_vocab_size": 2, "pad_token_id": 3, "hidden_act": "silu"},
    ),
}
MAMBA2 = {
    **{key: LLAMA[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")},
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 6,
    "n_groups": 1,
    "chunk_size": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": True,
}
BAMBA = LLAMA | {
    "num_key_value_heads": 2,
    "attn_layer_indices": [1],
    "mamba_n_heads": 8,
    "mamba_d_state": 6,
    "mamba_chunk_size": 8,
}
DECODERS |= {
    "mamba2": ("Mamba2ForCausalLM", MAMBA2),
    "mamba2-groups": (
        "Mamba2ForCausalLM",
        MAMBA2
        | {"n_groups": 4, "conv_kernel": 3, "expand": 1, "num_heads": 4}
        | {"tie_word_embeddings": False, "use_bias": True}
        | {"use_conv_bias": False, "hidden_act": "gelu", "time_step_limit": [0.3, 0.9]},
    ),
    "bamba": ("BambaForCausalLM", BAMBA),
    "bamba-groups": (
        "BambaForCausalLM",
        BAMBA
        | {"attn_layer_indices": [0, 2], "mamba_n_groups": 2}
        | {"attention_bias": True, "mamba_proj_bias": True}
        | {"hidden_size": 40, "hidden_act": "relu", "mamba_conv_bias": False},  # 5 of 10 rotate
    ),
}
QWEN3_NEXT = LLAMA | {
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 10,
}
DECODERS |= {
    "qwen3-next": ("Qwen3NextForCausalLM", QWEN3_NEXT),
    "qwen3-next-irregular": (
        "Qwen3NextForCausalLM",
        QWEN3_NEXT
        | {"layer_types": ["full_attention", *["linear_attention"] * 2], "mlp_only_layers": [1]}
        | {"num_hidden_layers": 3, "rms_norm_eps": 1e-3}
        | {"linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_conv_kernel_dim": 3}
        | {"norm_topk_prob": False, "tie_word_embeddings": True, "attention_bias": True}
        | {"hidden_act": "gelu", "rope_parameters": YARN_ALL_ROPE | {"partial_rotary_factor": 0.5}},
    ),
}
ENCODER_DECODERS = {
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-1.1": (
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "untied": True},
    ),
    "mt5": ("MT5ForConditionalGeneration", T5 | {"num_layers": 2, "d_kv": 10, "untied": True}),
    "umt5": ("UMT5ForConditionalGeneration", T5 | {"d_kv": 10, "untied": True}),
    "umt5-tied": ("UMT5ForConditionalGeneration", T5 | {"num_heads": 3, "num_layers": 2}),
    "bart": ("BartForConditionalGeneration", BART),
    "bart-untied-scaled": (
        "BartForConditionalGeneration",
        BART
        | {"untied": True, "scale_embedding": True, "activation_function": "relu"}
        | {"encoder_layers": 3, "decoder_layers": 1, "d_model": 32},
    ),
    "mbart": ("MBartForConditionalGeneration", BART | {"scale_embedding": True}),
    "mbart-tables": ("MBartForConditionalGeneration", BART | {"tie_word_embeddings": False}),
    "mt5-tied": ("MT5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-silu"}),
}
# There of the longest text in a batch.
BY_LENGTH = {"llama-longrope", "llama-dynamic", "gemma-longrope", "phi3-partial-longrope"}
KINDS = DECODERS | ENCODERS | ENCODER_DECODERS


def config_of(class_name, values):
    """A configuration of transformers, which writes into what it is made from."""
    return getattr(transformers, class_name).config_class(**copy.deepcopy(values))


def build(class_name, values):
    """A model with no parameter at a value that hides it.

    Under "untied" it has an output matrix of its own, as T5 1.1, which transformers 5 ties.
    """
    values = dict(values)
    untied = values.pop("untied", False)
    kind = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = kind(config_of(class_name, values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = "norm" in name.lower().replace("ln_", "norm") and name.endswith("weight")
            deviation = 0.2 if scale or "t5" not in class_name.lower() else 0.1
            parameter.copy_(torch.randn_like(parameter) * deviation + float(scale))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    if class_name.startswith(("Bert", "Deberta")) and not model.config.tie_word_embeddings:
        # Of the two biases of an untied output layer transformers uses one.
        model.cls.predictions.bias = torch.nn.Parameter(model.cls.predictions.decoder.bias.clone())
    if "Bart" in class_name and not model.config.tie_word_embeddings:
        # Of three tables of tokens transformers uses two.
        model.model.shared.weight = torch.nn.Parameter(
            model.model.decoder.embed_tokens.weight.clone()
        )
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
        model.all_tied_weights_keys.pop("lm_head.weight", None)
    return model
