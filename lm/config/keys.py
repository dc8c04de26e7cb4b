"""Configuration keys of the model, the data, what is learned and how a run proceeds.

The options of single objectives, optimizers and schedules are declared in `registries.py`.
"""

from __future__ import annotations

from lm.config.registry import Key

KEPT = (
    "auto",
    "float32",
    "bfloat16",
    "int8",
)  # dtypes of the KV cache and of weights in decoding; weights also allow int4
LIBRARY_OPTIMIZERS = (  # without plug-ins
    *("adamw", "adafactor", "sgd", "lion", "muon", "ademamix", "schedule_free", "soap"),
)
COMMON_KEYS: dict[str, Key] = {
    "seed": Key(0, "Seed of initialization, dropout and data order.", low=0, high=2**31 - 1),
    "paper": Key("", "Name of the published model that this configuration reproduces.", free=True),
    # --- model
    "model.family": Key("decoder", "Model family."),
    "model.n_layers": Key(4, "Layers: Transformer blocks, or recurrent layers.", low=1),
    "model.n_decoder_layers": Key(
        0,
        "Decoder layers; 0: n_layers.",
        low=0,
        needs=("model.family", "encoder_decoder", "lstm_encoder_decoder"),
    ),
    "model.d_model": Key(128, "Width of the residual stream.", low=1),
    "model.n_heads": Key(4, "Query heads.", low=1),
    "model.n_kv_heads": Key(0, "Key/value heads (grouped-query); 0: as many as n_heads.", low=0),
    "model.head_dim": Key(0, "Dimension of a head; 0: d_model / n_heads.", low=0),
    "model.d_ff": Key(0, "Width of the feed-forward layer; 0: 4 d_model.", low=0),
    "model.n_encoder_heads": Key(
        0,
        "Encoder heads, with the same total width as the decoder's; 0: n_heads.",
        low=0,
        needs=("model.family", "encoder_decoder"),
    ),
    "model.encoder_d_ff": Key(
        0,
        "Width of the encoder's feed-forward layer; 0: d_ff.",
        low=0,
        needs=("model.family", "encoder_decoder"),
    ),
    "model.vocab_size": Key(
        0,
        "Rows of the token embedding table; 0: the tokenizer's size. Tokens of data.added_tokens "
        "are included.",
        low=0,
    ),
    "model.max_length": Key(0, "Maximum context length; 0: data.sequence_length.", low=0),
    "model.n_mels": Key(
        0,
        "Mel bins of an audio source, with two frames per encoder position (Whisper: 80 or 128); "
        "0: the source is text.",
        low=0,
        needs=("model.family", "encoder_decoder"),
    ),
    "model.max_source_length": Key(
        0,
        "Maximum length of audio, in encoder positions; 0: data.sequence_length.",
        low=0,
        needs=("model.n_mels",),
    ),
    "model.residual": Key(
        "sum",
        "How a block's output h joins the residual stream H: H + h (sum), or concat(H, h W), which "
        "widens the stream by concat_width at each block; parallel: all sublayers read the same "
        "norm of H (PaLM); hyper: hyper-connections with "
        "hyper_streams streams (Zhu et al. 2024).",
        choices=("sum", "parallel", "concat", "hyper"),
    ),
    "model.hyper_streams": Key(
        4,
        "Residual streams of model.residual=hyper, the expansion rate n.",
        low=1,
        needs=("model.residual", "hyper"),
    ),
    "model.hyper_dynamic": Key(
        True,
        "The weights of hyper-connections depend on the tokens (DHC), instead of being static "
        "(SHC).",
        needs=("model.residual", "hyper"),
    ),
    "model.value_residual": Key(
        "none",
        "Later layers mix the first layer's attention values into theirs (ResFormer; Zhou et al. "
        "2024): fixed: half of each; learned: two weights per layer, initialized to 0.5.",
        choices=("none", "fixed", "learned"),
    ),
    "model.concat_width": Key(
        32,
        "Columns g of W [d_model, g] of model.residual=concat.",
        low=1,
        needs=("model.residual", "concat"),
    ),
    "model.mixer": Key("attention", "Token mixer of a Transformer block."),
    "model.attention_layers": Key(
        (),
        "Layers, counted from 0, with attention instead of model.mixer (Bamba: 9,18,27).",
    ),
    "model.feed_forward": Key(
        True, "Blocks have a feed-forward layer after the token mixer (Mamba: false)."
    ),
    "model.norm": Key("layernorm", "Normalization layer.", choices=("layernorm", "rmsnorm")),
    "model.norm_eps": Key(1e-5, "Epsilon of the normalization.", low=1e-20, high=1.0),
    "model.norm_placement": Key(
        "pre",
        "Normalize each sublayer's input (pre), the residual sum (post), input and output (both; "
        "Gemma 2), or the output only (OLMo 2).",
        choices=("pre", "post", "both", "output"),
    ),
    "model.norm_unit_offset": Key(False, "Norms multiply by 1 + scale, initialized to 0 (Gemma)."),
    "model.norm_bias": Key(True, "LayerNorm has a bias.", needs=("model.norm", "layernorm")),
    "model.embedding_norm": Key(False, "Normalize the sum of the embeddings (BERT)."),
    "model.embedding_size": Key(
        0,
        "Width of the embeddings, projected to d_model and, before tied logits, back (ALBERT, "
        "ELECTRA); 0: d_model.",
        low=0,
    ),
    "model.projection_first": Key(
        False,
        "Project the embeddings without a bias and before model.embedding_norm (DeBERTa).",
        needs=("model.embedding_size",),
    ),
    "model.separate_embeddings": Key(
        False,
        "Source and target have separate position embeddings and embedding norms, but share token "
        "embeddings (BART).",
        needs=("model.family", "encoder_decoder"),
    ),
    "model.separate_tokens": Key(
        False,
        "Source and target have separate token embeddings.",
        needs=("model.family", "encoder_decoder"),
    ),
    "model.bias": Key(True, "Linear layers have biases."),
    "model.attention_bias": Key(
        "same",
        "Attention biases: same as model.bias, all, all but the keys' (Whisper), queries, keys and "
        "values only (Qwen2), or none.",
        choices=("same", "all", "no_key", "qkv", "none"),
    ),
    "model.qk_norm": Key(False, "Normalize queries and keys."),
    "model.qk_norm_over": Key(
        "head",
        "qk_norm normalizes each head, with one scale for all heads (head; Qwen3) or one per head "
        "(each_head; StableLM 2 12B), or all heads of a token together (all; OLMo 2).",
        choices=("head", "each_head", "all"),
        needs=("model.qk_norm",),
    ),
    "model.attention_scale": Key(
        0.0, "Scale of attention logits (T5: 1); 0: 1 / sqrt(head_dim).", low=0.0
    ),
    "model.attention_softcap": Key(
        0.0, "Soft-cap of attention logits, cap tanh(x / cap) (Gemma 2); 0: off.", low=0.0
    ),
    "model.attention_sinks": Key(
        False,
        "Add a learned sink logit per head to the softmax, so that a token can attend to nothing "
        "(gpt-oss).",
    ),
    "model.attention_gate": Key(
        False,
        "Self-attention multiplies the outputs of its heads by sigmoids of the token, projected as "
        "queries are (Qwen3-Next).",
    ),
    "model.window": Key(
        0,
        "Sliding window of local layers, in tokens: in decoders including the token itself, in "
        "encoders half on either side; 0: no limit.",
        low=0,
    ),
    "model.window_chunks": Key(
        False,
        "Local layers attend within fixed chunks of model.window tokens instead of a sliding "
        "window (Llama 4).",
    ),
    "model.global_every": Key(
        0,
        "With a window, every n-th layer is global and the others are local (Gemma 2 and GPT-3: 2,"
        " Gemma 3: 6); 0: all are local.",
        low=0,
    ),
    "model.global_first": Key(
        False,
        "Global layers are 1, n + 1, 2n + 1, … instead of n, 2n, … (ModernBERT).",
        needs=("model.global_every",),
    ),
    "model.global_layers": Key(
        (),
        "Global layers, counted from 0, if they are not every n-th.",
        needs=("model.window",),
    ),
    "model.first_norm": Key(
        True,
        "Normalize the input of the first attention layer; ModernBERT normalizes the embeddings "
        "instead.",
    ),
    "model.transform_bias": Key(
        True,
        "The dense layer before an encoder's output matrix has a bias.",
        needs=("model.family", "encoder"),
    ),
    "model.transform_activation": Key(
        "family",
        "Activation of the dense layer before an encoder's output matrix; family: the one of "
        "model.activation (RoBERTa, ELECTRA: gelu_erf).",
        choices=("family", "relu", "gelu_tanh", "gelu_erf", "silu"),
        needs=("model.family", "encoder"),
    ),
    "model.task_transform": Key(
        False,
        "Task heads follow the dense layer and norm of an encoder's output (ModernBERT); "
        "classifiers then have no pooler.",
        needs=("model.family", "encoder"),
    ),
    "model.pooler_activation": Key(
        "tanh",
        "Activation of the pooler, BERT's dense layer over the first token (ELECTRA, DeBERTa: "
        "gelu_erf).",
        choices=("tanh", "gelu_erf", "gelu_tanh", "relu", "silu"),
        needs=("model.family", "encoder"),
    ),
    "model.first_conv": Key(
        0,
        "Width, in tokens, of a convolution of the embeddings that is added to the output of the "
        "first layer (DeBERTa v2); an odd number; 0: none.",
        low=0,
        high=99,
        needs=("model.family", "encoder"),
    ),
    "model.conv_activation": Key(
        "tanh",
        "Activation of that convolution.",
        choices=("tanh", "gelu_erf", "gelu_tanh", "relu", "silu"),
        needs=("model.first_conv",),
    ),
    "model.generator_width": Key(
        0,
        "d_model of the generator that replaces tokens (ELECTRA); its heads and d_ff scale with "
        "it; 0: d_model.",
        low=0,
        needs=("objective.name", "replaced_tokens"),
    ),
    "model.generator_layers": Key(
        0,
        "Layers of the generator; 0: n_layers.",
        low=0,
        needs=("objective.name", "replaced_tokens"),
    ),
    "model.positions": Key(
        "learned",
        "Position encoding; rotary: RoPE; relative: T5's attention bias; alibi: a bias linear in "
        "the distance, with a fixed slope per head (Press et al. 2022); disentangled: a table "
        "that model.mixer=disentangled attends to (DeBERTa).",
        choices=("learned", "sinusoidal", "rotary", "relative", "alibi", "disentangled", "none"),
    ),
    "model.position_offset": Key(
        0,
        "Row of the position table that position 0 uses (RoBERTa).",
        low=0,
        needs=("model.positions", "learned"),
    ),
    "model.relative_buckets": Key(
        32,
        "Buckets of the relative position bias.",
        low=4,
        needs=("model.positions", "relative", "disentangled"),
    ),
    "model.relative_max_distance": Key(
        128,
        "Distances from here on share one bucket.",
        low=4,
        needs=("model.positions", "relative", "disentangled"),
    ),
    "model.relative_per_layer": Key(
        False,
        "Each layer has a relative position bias of its own (UMT5).",
        needs=("model.positions", "relative"),
    ),
    "model.token_types": Key(0, "Number of segment embeddings (BERT); 0: none.", low=0),
    "model.nope_every": Key(
        0,
        "Every n-th layer has no rotary positions (NoPE; SmolLM3 and Llama 4: 4); 0: all layers "
        "have them.",
        low=0,
        needs=("model.positions", "rotary"),
    ),
    "model.nope_layers": Key(
        (),
        "Layers without rotary positions, counted from 0, if they are not every n-th.",
        needs=("model.positions", "rotary"),
    ),
    "model.nope_temperature": Key(
        0.0,
        "NoPE layers scale the query at position i by 1 + x ln(1 + floor((i + 1) / "
        "nope_temperature_length)), where x is this value (Llama 4: 0.1).",
        low=0.0,
        needs=("model.positions", "rotary"),
    ),
    "model.nope_temperature_length": Key(
        8192,
        "Positions below this one keep their query scale.",
        low=1,
        needs=("model.nope_temperature",),
    ),
    "model.rope_theta": Key(
        10_000.0, "Base of the RoPE wavelengths.", low=1.0, needs=("model.positions", "rotary")
    ),
    "model.rope_theta_local": Key(
        0.0,
        "RoPE base of local layers, to which rope_scaling then does not apply (Gemma 3); 0: same "
        "as global layers.",
        low=0.0,
    ),
    "model.rope_fraction": Key(
        1.0,
        "Fraction of the head dimension that is rotated, from its start (StableLM: 0.25).",
        low=0.0,
        high=1.0,
        needs=("model.positions", "rotary"),
    ),
    "model.rope_norm": Key(
        False,
        "Apply RMSNorm without a scale to each head of queries and keys after RoPE, except in NoPE"
        " layers (Llama 4).",
        needs=("model.positions", "rotary"),
    ),
    "model.rope_scaling": Key(
        "none",
        "RoPE scaling by rope_factor: linear: all wavelengths; llama3 (Llama 3.1), yarn: the long "
        "ones; dynamic: grows with the sequence length; longrope: a factor per wavelength (Phi).",
        choices=("none", "linear", "llama3", "yarn", "dynamic", "longrope"),
        needs=("model.positions", "rotary"),
    ),
    "model.rope_factor": Key(
        1.0, "Factor of rope_scaling.", low=1e-6, needs=("model.rope_scaling",)
    ),
    "model.rope_low_frequency": Key(
        1.0,
        "llama3, yarn (beta_slow): wavelengths with fewer rotations than this in "
        "rope_original_length are fully scaled.",
        low=1e-6,
        needs=("model.rope_scaling", "llama3", "yarn"),
    ),
    "model.rope_high_frequency": Key(
        4.0,
        "llama3, yarn (beta_fast; YaRN: 32): wavelengths with more rotations than this in "
        "rope_original_length are not scaled.",
        low=1e-6,
        needs=("model.rope_scaling", "llama3", "yarn"),
    ),
    "model.rope_original_length": Key(
        8192,
        "Context length before scaling.",
        low=1,
        needs=("model.rope_scaling", "llama3", "yarn", "dynamic", "longrope"),
    ),
    "model.rope_attention_factor": Key(
        0.0,
        "yarn, longrope: scale of rotated queries and keys; 0: from rope_factor, as in the papers.",
        low=0.0,
        needs=("model.rope_scaling", "yarn", "longrope"),
    ),
    "model.rope_truncate": Key(
        True,
        "yarn: round the bounds of the scaled range to integer wavelength indices.",
        needs=("model.rope_scaling", "yarn"),
    ),
    "model.rope_short_factor": Key(
        (),
        "longrope: one factor per wavelength (half of the rotated dimension), for sequences up to "
        "rope_original_length.",
        needs=("model.rope_scaling", "longrope"),
    ),
    "model.rope_long_factor": Key(
        (),
        "longrope: factors for longer sequences.",
        needs=("model.rope_scaling", "longrope"),
    ),
    "model.activation": Key(
        "gelu_tanh",
        "Activation function; the glu ones are gated (two input projections); swiglu_clipped: "
        "g sigmoid(1.702 g) (x + 1), gate g at most 7 and input x clipped to ±7 (gpt-oss).",
        choices=(
            *("relu", "gelu_tanh", "gelu_erf", "silu", "reglu", "swiglu", "geglu", "geglu_erf"),
            "swiglu_clipped",
        ),
    ),
    "model.n_experts": Key(0, "Experts per MoE layer (Switch, Mixtral); 0: dense layers.", low=0),
    "model.experts_per_token": Key(
        2, "Experts per token (Switch: 1, Mixtral: 2).", low=1, needs=("model.n_experts",)
    ),
    "model.experts_every": Key(
        1,
        "Every n-th layer is an MoE layer; the others are dense.",
        low=1,
        needs=("model.n_experts",),
    ),
    "model.expert_layers": Key(
        (),
        "MoE layers, counted from 0, if they are not every n-th.",
        needs=("model.n_experts",),
    ),
    "model.expert_d_ff": Key(
        0,
        "Feed-forward width of an expert; 0: d_ff, as in dense layers.",
        low=0,
        needs=("model.n_experts",),
    ),
    "model.expert_weights": Key(
        "auto",
        "Weights of a token's experts: router probabilities (Switch, OLMoE), or normalized to sum "
        "to 1 (Mixtral, Qwen3); auto: probability with one expert per token, else normalized.",
        choices=("auto", "probability", "normalized"),
        needs=("model.n_experts",),
    ),
    "model.expert_weights_scale": Key(
        1.0, "Scale of the expert weights (DeepSeek).", low=0.0, needs=("model.n_experts",)
    ),
    "model.expert_weights_input": Key(
        False,
        "Expert weights multiply an expert's input instead of its output (Llama 4).",
        needs=("model.n_experts",),
    ),
    "model.router_scores": Key(
        "softmax",
        "Router scores: softmax, or a sigmoid of each logit (DeepSeek-V3).",
        choices=("softmax", "sigmoid"),
        needs=("model.n_experts",),
    ),
    "model.expert_groups": Key(
        0,
        "Groups of experts, of which a token uses expert_groups_per_token (DeepSeek); 0: no "
        "groups.",
        low=0,
        needs=("model.n_experts",),
    ),
    "model.expert_groups_per_token": Key(
        0,
        "Groups that each token's experts are chosen from.",
        low=0,
        needs=("model.expert_groups",),
    ),
    "model.expert_group_best": Key(
        1,
        "Number of top scores summed to rank a group (DeepSeek-V2: 1, V3: 2).",
        low=1,
        needs=("model.expert_groups",),
    ),
    "model.shared_expert_d_ff": Key(
        0,
        "Width of the shared expert, which every token uses; 0: none.",
        low=0,
        needs=("model.n_experts",),
    ),
    "model.shared_expert_gate": Key(
        False,
        "Multiply the shared expert's output by a sigmoid of the token (Qwen2-MoE).",
        needs=("model.shared_expert_d_ff",),
    ),
    "model.dense_layers": Key(0, "Dense layers before the first MoE layer (DeepSeek).", low=0),
    "model.expert_capacity": Key(
        0.0,
        "Capacity factor: tokens per row that an expert accepts in training, relative to an even "
        "split; the rest are dropped. 0: no limit. Evaluation and decoding drop nothing.",
        low=0.0,
        needs=("model.n_experts",),
    ),
    "model.balance_loss": Key(
        0.01,
        "Weight of the load-balancing loss of each MoE layer (Switch).",
        low=0.0,
        needs=("model.n_experts",),
    ),
    "model.router_z_loss": Key(
        0.0,
        "Weight of the router z-loss of each MoE layer (ST-MoE).",
        low=0.0,
        needs=("model.n_experts",),
    ),
    "model.router_jitter": Key(
        0.0,
        "Router inputs are multiplied by noise within 1 ± this in training (Switch).",
        low=0.0,
        high=0.99,
        needs=("model.n_experts",),
    ),
    "model.router_bias": Key(
        False, "Routers have a learned bias (gpt-oss).", needs=("model.n_experts",)
    ),
    "model.router_bias_rate": Key(
        0.0,
        "Update rate, per microbatch, of the selection bias that balances expert loads without an "
        "auxiliary loss (DeepSeek-V3, with model.balance_loss=0); 0: no bias.",
        low=0.0,
        needs=("model.n_experts",),
    ),
    "model.tie_embeddings": Key(True, "Share the output projection with the token embeddings."),
    "model.scale_embeddings": Key(False, "Multiply embeddings by sqrt(d_model)."),
    "model.embedding_multiplier": Key(
        1.0, "Multiplier of token embeddings (Granite).", low=1e-6, high=1e6
    ),
    "model.residual_multiplier": Key(
        1.0, "Multiplier of each sublayer's output (Granite).", low=1e-6, high=1e6
    ),
    "model.logits_scaling": Key(1.0, "Divisor of the logits (Granite).", low=1e-6, high=1e6),
    "model.scale_logits": Key(
        False, "Divide tied logits by sqrt(d_model) (T5).", needs=("model.tie_embeddings", "True")
    ),
    "model.logit_softcap": Key(
        0.0, "Soft-cap of the logits, cap tanh(x / cap) (Gemma 2); 0: off.", low=0.0
    ),
    "model.mup_base_width": Key(
        0,
        "muP base width (Yang et al. 2022): the d_model whose best learning rate transfers to "
        "other widths, if d_ff scales with d_model; at this width muP changes nothing. 0: no muP.",
        low=0,
    ),
    "model.mup_base_head_dim": Key(
        0, "head_dim at mup_base_width; 0: head_dim (wider models have more heads).", low=0
    ),
    "model.n_classes": Key(
        0,
        "Classifier outputs; 0: the number of data.labels.",
        low=0,
        needs=("objective.name", "classification", "token_classification", "reward"),
    ),
    "model.d_hidden": Key(
        0,
        "Hidden units of a recurrent layer (both directions together) or of NPLM; 0: d_model.",
        low=0,
        needs=("model.family", "lstm", "lstm_encoder_decoder", "nplm"),
    ),
    "model.pooling": Key(
        "family",
        "Sequence representation of a Transformer classifier: the family's (BERT's pooler on the "
        "first token, elsewhere the last token), or the mean over tokens; shifted: BERT's pooler "
        "on the last output of a decoder that reads the text shifted right (BART).",
        choices=("family", "mean", "shifted"),
        needs=("objective.name", "classification", "reward", "span_qa"),
    ),
    "model.start_id": Key(
        -1,
        "First token of the shifted text, such as T5's 0; -1: the text's last token (BART).",
        low=-1,
        needs=("model.pooling", "shifted"),
    ),
    "model.copy": Key(
        False,
        "Mix the output distribution with one over the tokens of the source, a pointer-generator "
        "(See et al. 2017).",
        needs=("model.family", "encoder_decoder", "lstm_encoder_decoder"),
    ),
    "model.bidirectional": Key(
        False,
        "Recurrent encoders and classifiers are bidirectional.",
        needs=("model.family", "lstm", "lstm_encoder_decoder"),
    ),
    "model.context": Key(4, "Context words of NPLM.", low=1, needs=("model.family", "nplm")),
    "model.direct": Key(
        False,
        "NPLM's direct connections from embeddings to output.",
        needs=("model.family", "nplm"),
    ),
    "model.carry": Key(
        False, "Recurrent state passes from one batch to the next; needs data.order=contiguous."
    ),
    "model.dropout": Key(0.0, "Dropout of embeddings and sublayer outputs.", low=0.0, high=0.99),
    "model.activation_dropout": Key(
        0.0, "Dropout inside the feed-forward layer.", low=0.0, high=0.99
    ),
    "model.final_dropout": Key(False, "Dropout also after the final norm of a stack (T5)."),
    "model.attention_dropout": Key(0.0, "Dropout of attention weights.", low=0.0, high=0.99),
    "model.init": Key(
        "normal",
        "Standard deviation of kernels: init_std, 1/sqrt(fan_in), or sqrt(2/(fan_in + fan_out)); "
        "embeddings use init_std; uniform: all in ± init_std (not for Transformers).",
        choices=("normal", "fan_in", "xavier", "uniform"),
    ),
    "model.init_std": Key(
        0.02, "Standard deviation of the normal initialization.", low=0.0, high=10.0
    ),
    "model.init_scale": Key(
        1.0,
        "Variance scale of fan_in: the deviation is sqrt(this/fan_in) (Switch: 0.1).",
        low=0.0,
        high=100.0,
        needs=("model.init", "fan_in"),
    ),
    "model.init_truncated": Key(
        False,
        "Truncate the normal at two standard deviations (BERT, Switch), without rescaling (0.88 "
        "remains).",
    ),
    "model.scale_residual_init": Key(
        True, "Divide the init_std of residual output projections by sqrt(2 n_layers) (GPT-2)."
    ),
    "model.dtype": Key(
        "auto",
        "Compute dtype; auto: bfloat16 on TPU and GPU, float32 on CPU. Parameters stay float32.",
        choices=("auto", "float32", "bfloat16"),
    ),
    "model.attention": Key(
        "auto",
        "Attention kernel: xla: plain; tiled: skips the masked half (for CPUs); blockwise: one "
        "tile of logits at a time; splash, flash (TPU), cudnn, tokamax, triton (GPU): fused; auto:"
        " the platform's first that supports the model, else xla.",
        choices=(
            *("auto", "xla", "tiled", "blockwise", "splash", "flash"),
            *("cudnn", "tokamax", "triton"),
        ),
        free=True,
    ),
    # --- data
    "data.source": Key(
        "stdlib",
        "Corpora, comma-separated: stdlib, text:FILE, jsonl:FILE, parquet:FILE, arrow:FOLDER, "
        "datasets:NAME, tfds:NAME, warc:FILE, nanogpt:FILE, megatron:PREFIX. For seq2seq, "
        "classification, span_qa and token_classification one of tsv:FILE, csv:FILE, jsonl:FILE, "
        "parquet:FILE, arrow:FOLDER, datasets:NAME, parallel:FILE|FILE, squad:FILE, conll:FILE. "
        "For transcription audio:PATH.",
    ),
    "data.weights": Key((), "Mixture weights of the corpora; (): by token count."),
    "data.schedule": Key(
        "",
        "Mixture weights over time: STEP: WEIGHT WEIGHT …; STEP: …, interpolated linearly; list a "
        "step twice for a jump.",
    ),
    "data.epochs": Key((), "Mixture weights as relative numbers of epochs over each corpus."),
    "data.directory": Key(
        "",
        "Base folder of relative paths; empty: $LM_DATA_DIR, else the current folder.",
        free=True,
    ),
    "data.field": Key(
        "text",
        "Field or column with the text; dots select nested fields (meta.text).",
        needs=("data.source", "jsonl", "tfds", "parquet", "arrow", "datasets"),
    ),
    "data.documents": Key(
        "file",
        "What a document is in a text file.",
        choices=("file", "line"),
        needs=("data.source", "text"),
    ),
    "data.split": Key(
        "train",
        "Split to train on, of a source with splits.",
        needs=("data.source", "tfds", "arrow", "datasets"),
    ),
    "data.validation_split": Key(
        "validation",
        "Split to validate on, of a source with splits.",
        needs=("data.source", "tfds", "arrow", "datasets"),
    ),
    "data.token_dtype": Key(
        "",
        "Type of the ids in a token file without a header (nanogpt): uint16 or uint32.",
        choices=("", "uint16", "uint32", "int32", "int64"),
        needs=("data.source", "nanogpt"),
    ),
    "data.end_token": Key(
        "",
        "Token that separates documents in token files (nanogpt), an id or a vocabulary entry; "
        "empty: the tokenizer's end token; none: a single document.",
        needs=("data.source", "nanogpt"),
    ),
    "data.validation_source": Key("", "Corpora for validation, written as data.source."),
    "data.test_source": Key("", "Corpora for `lm eval --split test`.", free=True),
    "data.columns": Key(
        "", "Record columns by role, such as text=sentence,label=label, or by index from 0."
    ),
    "data.header": Key(
        True,
        "TSV and CSV files have a header row.",
        needs=("data.source", "tsv", "csv"),
    ),
    "data.bad_rows": Key(
        "error", "Treat a malformed row as an error, or skip it.", choices=("error", "skip")
    ),
    "data.canaries": Key(
        0,
        "Random lines planted in the first training corpus; lm eval --safety measures how well "
        "they are memorized.",
        low=0,
        high=10_000,
        needs=(
            "objective.name",
            "causal",
            "prefix",
            "masked",
            "span_corruption",
            "denoising",
            "replaced_tokens",
        ),
    ),
    "data.canary_format": Key(
        "the random number is ######",
        "Text of a canary; each # becomes a random digit.",
        needs=("data.canaries",),
    ),
    "data.canary_repeats": Key(
        (1.0,),
        "Repetitions of canaries, assigned in turn: 1,4,16 plants a third of them with each count.",
        needs=("data.canaries",),
    ),
    "data.labels": Key(
        "",
        "Class names, comma-separated; empty: regression.",
        needs=("objective.name", "classification", "token_classification"),
    ),
    "data.multi_label": Key(
        False,
        "Texts have any number of labels: lists, or names separated by commas; without "
        "data.labels: model.n_classes numbers.",
        needs=("objective.name", "classification"),
    ),
    "data.target_length": Key(0, "Tokens of a target sequence; 0: data.sequence_length.", low=0),
    "data.target_prefix": Key(
        "",
        "Tokens that each target begins with after the start token, comma-separated; there is no "
        "loss on them (Whisper: <|en|>,<|transcribe|>,<|notimestamps|>).",
        needs=("objective.name", "seq2seq", "transcription"),
    ),
    "data.doc_stride": Key(
        128,
        "Stride between windows over a long context, in tokens.",
        low=1,
        needs=("objective.name", "span_qa"),
    ),
    "data.pack": Key(True, "Pack several short examples into a row."),
    "data.order": Key(
        "shuffled",
        "Order of training windows; contiguous: row r of a batch continues row r of the previous "
        "one.",
        choices=("shuffled", "contiguous"),
    ),
    "data.validation_fraction": Key(
        0.0,
        "Fraction held out for validation if there is no validation source: random documents or "
        "records, or the end of a single document.",
        low=0.0,
        high=0.9,
    ),
    "data.validation_seed": Key(0, "Seed of the random choice of data.validation_fraction.", low=0),
    "data.tokenizer": Key(
        "byte",
        "byte; char, words or sentencepiece (trained on the corpus); words:FILE, "
        "sentencepiece:FILE, tokenizers:FILE.json, gpt2:FOLDER, folder:DIR (a Hugging Face "
        "model's), run:WORKDIR (a run's).",
    ),
    "data.tokenizer_vocab_size": Key(
        4096,
        "Vocabulary size of a tokenizer trained on the corpus (sentencepiece; maximum for words).",
        low=2,
        needs=("data.tokenizer", "sentencepiece", "words"),
    ),
    "data.tokenizer_min_count": Key(
        1,
        "Minimum count of a word; the words tokenizer maps rarer ones to unknown.",
        low=1,
        needs=("data.tokenizer", "words"),
    ),
    "data.lowercase": Key(
        False,
        "The tokenizer trained on the corpus (words, sentencepiece) lowercases text.",
        needs=("data.tokenizer", "words", "sentencepiece"),
    ),
    "data.added_tokens": Key(
        "",
        "Special tokens added to the vocabulary, comma-separated; template: those of the built-in "
        "chat template, unless the tokenizer has its own template; empty: template for objectives "
        "on conversations, none for others.",
    ),
    "data.chat_template": Key(
        "", "Jinja file of the chat template; empty: the tokenizer's, else the built-in one."
    ),
    "data.chat_markers": Key(
        False,
        "Encode names of special tokens inside messages as special tokens, as transformers does; "
        "otherwise as plain characters, so that message text cannot forge a turn.",
    ),
    "data.sequence_length": Key(256, "Tokens per example.", low=1),
    "data.stride": Key(0, "Stride between training windows, in tokens; 0: no overlap.", low=0),
    "data.isolate_documents": Key(True, "Attention and positions stay within a document."),
    "data.batch_size": Key(8, "Sequences per step, over all devices.", low=1),
    "data.batch_ramp": Key(
        "",
        "Batch-size warmup, STEP: SIZE; STEP: SIZE; …, from step 0 up to batch_size (GPT-3: 0: 16;"
        " 1000: 32; …).",
    ),
    "data.length_ramp": Key(
        "",
        "Sequence-length warmup, STEP: LENGTH; …, from step 0 up to sequence_length; examples are "
        "truncated.",
        needs=("objective.name", "causal", "distillation"),
    ),
    "data.cache_directory": Key(
        "",
        "Folder or bucket URL of token stores; empty: $LM_CACHE_DIR, else ~/.cache/lm.",
        free=True,
    ),
    "data.shard_cache": Key(
        100.0, "Local disk for caching token stores in a bucket, in GiB.", low=0.0, free=True
    ),
    "data.workers": Key(0, "Tokenization processes; 0: one per core.", low=0, high=1024, free=True),
    "data.prefetch": Key(2, "Batches prepared ahead.", low=1, high=1024, free=True),
    # --- objective
    "objective.name": Key("causal", "Training objective."),
    "objective.label_smoothing": Key(
        0.0, "Fraction of a target's probability spread over the vocabulary.", low=0.0, high=0.99
    ),
    "objective.z_loss": Key(
        0.0, "Weight of the z-loss, the squared log-partition (T5, PaLM).", low=0.0
    ),
    # --- start from other weights
    "init.from": Key(
        "", "Run to start from, with its parameters only: its workdir, or RUN/checkpoints/STEP."
    ),
    "init.average": Key(
        1, "Average the last n checkpoints of that run.", low=1, needs=("init.from",)
    ),
    "init.fresh": Key("", "Patterns of parameters to initialize from scratch, comma-separated."),
    "init.leave": Key(
        "", "Patterns of parameters of that run to skip, comma-separated.", needs=("init.from",)
    ),
    "init.rename": Key(
        "", "Renamed parameters of that run: PATTERN=>NAME, comma-separated.", needs=("init.from",)
    ),
    "init.vectors": Key("", "GloVe file for the token embeddings of the words tokenizer."),
    # --- low-rank adaptation
    "lora.rank": Key(0, "LoRA rank (Hu et al. 2021); 0: off.", low=0),
    "lora.alpha": Key(16.0, "Updates are scaled by alpha / rank.", low=1e-6, needs=("lora.rank",)),
    "lora.targets": Key(
        "attention/(query|value)/kernel", "Pattern of the adapted kernels.", needs=("lora.rank",)
    ),
    "lora.base": Key(
        "float32",
        "Dtype of the layers' frozen matrices; int8 has one scale per output.",
        choices=("float32", "int8"),
        needs=("lora.rank",),
    ),
    "lora.train": Key("", "Patterns of other parameters to train as well, comma-separated."),
    # --- optimizer
    "optimizer.freeze": Key(
        "",
        "Patterns of parameters to freeze, comma-separated; layers/3/ matches a single layer.",
    ),
    "optimizer.layer_decay": Key(
        1.0, "Learning rate of a layer relative to the layer above it.", low=1e-6, high=1.0
    ),
    "optimizer.rates": Key(
        "",
        "Learning-rate factors by parameter, PATTERN=>FACTOR, comma-separated; patterns as in "
        "optimizer.freeze.",
    ),
    "optimizer.name": Key("adamw", "Optimizer."),
    "optimizer.learning_rate": Key(1e-3, "Peak learning rate.", low=0.0, high=1e6),
    "optimizer.weight_decay": Key(0.1, "Decoupled weight decay, times the learning rate.", low=0.0),
    "optimizer.decay": Key(
        "matrices",
        "Parameters with weight decay: kernels and embeddings, kernels only, or all.",
        choices=("matrices", "kernels", "all"),
    ),
    "optimizer.moments": Key(
        "float32",
        "Dtype of the moments of weight matrices; int8 has one scale per row.",
        choices=("float32", "bfloat16", "int8"),
    ),
    "optimizer.cautious": Key(
        "none",
        "Mask updates whose sign disagrees with the gradient (updates; Liang et al. 2024), weight "
        "decay whose sign disagrees with the update (decay; Chen et al. 2025), or both.",
        choices=("none", "updates", "decay", "both"),
        needs=("optimizer.name", *LIBRARY_OPTIMIZERS),
    ),
    "optimizer.qk_clip": Key(
        0.0,
        "Largest attention logit (Kimi K2's MuonClip: 100): query and key weights of heads whose "
        "logits were larger in a step are scaled down after its update; 0: off.",
        low=0.0,
        high=1e6,
    ),
    "optimizer.ema": Key(
        0.0,
        "Decay of a bias-corrected moving average of the parameters, which is evaluated, saved and"
        " exported in their place; 0: off.",
        low=0.0,
        high=0.999999,
    ),
    "optimizer.clip_norm": Key(1.0, "Gradient clipping by global norm; 0: off.", low=0.0),
    # --- schedule
    "schedule.name": Key("cosine", "Learning-rate schedule after warmup."),
    "schedule.warmup_steps": Key(0, "Linear warmup steps.", low=0),
    "schedule.hold_steps": Key(0, "Steps at the peak before any decay.", low=0),
    "schedule.decay_steps": Key(
        0,
        "Step at which cosine, linear, inverse and wsd reach the final rate; 0: train.steps.",
        low=0,
        needs=("schedule.name", "cosine", "linear", "inverse", "wsd"),
    ),
    "schedule.final_ratio": Key(
        0.1,
        "Final learning rate relative to the peak.",
        low=0.0,
        high=1.0,
        needs=("schedule.name", "cosine", "linear", "inverse", "wsd"),
    ),
    # --- training
    "train.steps": Key(1000, "Optimizer steps.", low=1),
    "train.microbatches": Key(1, "Gradient accumulation: parts that a batch is split into.", low=1),
    "train.remat": Key(
        "none",
        "Rematerialization in the backward pass: none, dots (all but matmul results), or full; "
        "offload_dots: matmul results are offloaded to host memory; offload: each layer's input "
        "is, and everything else is recomputed.",
        choices=("none", "dots", "full", "offload_dots", "offload"),
        free=True,
    ),
    "train.scan_unroll": Key(
        1, "Layers per iteration of the layer scan; 0: all.", low=0, free=True
    ),
    "train.loss_chunk": Key(
        0,
        "Sequence positions whose logits a device holds at once, or blocks of the vocabulary of "
        "the same size if devices share the rows; 0: all.",
        low=0,
        free=True,
    ),
    "train.steps_per_dispatch": Key(
        1, "Training steps per call of the compiled program.", low=1, high=1000
    ),
    "train.nonfinite": Key(
        "halt",
        "On a non-finite loss or gradient, halt with the last good state or skip the update.",
        choices=("halt", "skip"),
        free=True,
    ),
    "train.stop_at": Key(
        0,
        "Save and stop with exit code 75 at this step, or at the end of its dispatch "
        "(train.steps_per_dispatch); 0: never.",
        low=0,
        free=True,
    ),
    "train.stall_seconds": Key(
        1800.0,
        "End the run with an error after this many seconds without progress; 0: never.",
        low=0.0,
        free=True,
    ),
    "train.precision": Key(
        "none",
        "int8, fp8: the layers' matmuls in 8 bits, scaled by row; qat: quantization-aware training"
        " for decode.weights, with straight-through gradients.",
        choices=("none", "int8", "fp8", "qat"),
    ),
    "train.profile": Key(
        "",
        "START:STEPS: trace STEPS steps from step START (counted from 0) to WORKDIR/profile, for "
        "xprof and Perfetto, with a device-memory profile.",
        free=True,
    ),
    # --- evaluation
    "eval.every_steps": Key(0, "Validate every n steps; 0: only at the end.", low=0, free=True),
    "eval.by_source": Key(
        False,
        "Also report the loss of each validation corpus, with another pass over it.",
        free=True,
    ),
    "eval.batch_size": Key(
        0, "Sequences per validation batch; 0: data.batch_size.", low=0, free=True
    ),
    "eval.max_batches": Key(
        0, "Maximum validation batches during training; 0: the whole split.", low=0, free=True
    ),
    "eval.final_batches": Key(
        0, "Maximum validation batches after the last step; 0: the whole split.", low=0, free=True
    ),
    "eval.metrics": Key(
        "",
        "Metrics of `lm eval --task`, comma-separated; empty: the objective's defaults.",
        free=True,
    ),
    "eval.best": Key(
        "", "Also keep the best checkpoint by this validation metric, such as accuracy or -loss."
    ),
    "eval.safety": Key(
        "",
        "Safety sets to run at validations, comma-separated (lm eval --safety lists them); empty: "
        "none.",
        free=True,
    ),
    "eval.safety_every": Key(
        0,
        "Run safety sets at validations at multiples of this step count and at the last; 0: at "
        "all.",
        low=0,
        free=True,
        needs=("eval.safety",),
    ),
    "eval.harness": Key(
        "",
        "lm-eval tasks, or their YAML files, to run at validations, comma-separated; empty: none.",
        free=True,
    ),
    "eval.harness_every": Key(
        0,
        "Run lm-eval tasks at validations at multiples of this step count and at the last; 0: at "
        "all.",
        low=0,
        free=True,
        needs=("eval.harness",),
    ),
    "eval.harness_limit": Key(
        0, "Documents per lm-eval task; 0: all.", low=0, free=True, needs=("eval.harness",)
    ),
    "safety.limit": Key(
        0, "Items used of each safety set, evenly spaced; 0: all.", low=0, free=True
    ),
    # --- decoding
    "decode.beam_size": Key(1, "Beam width; 1: greedy.", low=1, high=1000, free=True),
    "decode.length_penalty": Key(
        0.6,
        "Length penalty: beam scores are divided by ((5 + length) / 6)^this.",
        low=0.0,
        free=True,
    ),
    "decode.min_length": Key(0, "Minimum output tokens before the end token.", low=0, free=True),
    "decode.max_length": Key(0, "Maximum output tokens; 0: data.target_length.", low=0, free=True),
    "decode.repetition_penalty": Key(
        1.0, "Repetition penalty; above 1 makes repeats less likely.", low=0.01, free=True
    ),
    "decode.banned": Key("", "Words that are never generated, comma-separated.", free=True),
    "decode.banned_tokens": Key(
        "",
        "Token ids that are never generated, comma-separated; 4 5: this sequence; ^6: not first.",
        free=True,
    ),
    "decode.allowed": Key(
        "", "The only words an output may contain, comma-separated, case-insensitive.", free=True
    ),
    "decode.banned_pattern": Key(
        "",
        "Regular expression (Rust syntax, no look-around) that outputs must not match.",
        free=True,
    ),
    "decode.grammar": Key(
        "",
        "Grammar that outputs must follow: json:FILE (a JSON schema), lark:FILE or regex:PATTERN.",
        free=True,
    ),
    "decode.guard": Key(
        "", "Workdir of a classifier that blocks outputs of the guard_labels classes.", free=True
    ),
    "decode.guard_labels": Key(
        "", "Classes that the guard blocks, comma-separated.", free=True, needs=("decode.guard",)
    ),
    "decode.guard_threshold": Key(
        0.5,
        "Outputs are blocked if the summed probability of these classes exceeds this.",
        low=0.0,
        high=1.0,
        free=True,
        needs=("decode.guard",),
    ),
    "decode.batch_size": Key(32, "Inputs decoded per batch.", low=1, free=True),
    "decode.weights": Key(
        "auto",
        "Dtype of kernels and embedding tables; auto: model.dtype (evaluation: no rounding).",
        choices=(*KEPT, "int4"),
        free=True,
    ),
    "decode.cache": Key("auto", "Dtype of the KV cache.", choices=KEPT, free=True),
    # --- checkpoints
    "checkpoint.every_steps": Key(1000, "Save every n steps; 0: never.", low=0, free=True),
    "checkpoint.every_seconds": Key(
        600.0,
        "Save when this many seconds have passed since the last checkpoint; 0: never.",
        low=0.0,
        free=True,
    ),
    "checkpoint.keep_last": Key(3, "Number of latest checkpoints to keep.", low=1, free=True),
    "checkpoint.keep_every_steps": Key(
        0,
        "Keep checkpoints at multiples of this step count permanently; 0: none.",
        low=0,
        free=True,
    ),
    # --- parallelism
    "parallel.preset": Key(
        "custom",
        "Mesh preset: data or fsdp puts all devices on that axis; custom: parallel.mesh.",
        choices=("custom", "data", "fsdp"),
        free=True,
    ),
    "parallel.mesh.slice": Key(
        1,
        "Data parallelism over slices joined by the slow network.",
        low=-1,
        free=True,
        needs=("parallel.preset", "custom"),
    ),
    "parallel.mesh.stage": Key(
        1,
        "Pipeline stages.",
        low=-1,
        free=True,
        needs=("parallel.preset", "custom"),
    ),
    "parallel.mesh.data": Key(
        -1,
        "Data parallelism; -1: all remaining devices.",
        low=-1,
        free=True,
        needs=("parallel.preset", "custom"),
    ),
    "parallel.mesh.fsdp": Key(
        1,
        "Data parallelism with sharded parameters and optimizer state.",
        low=-1,
        free=True,
        needs=("parallel.preset", "custom"),
    ),
    "parallel.mesh.expert": Key(
        1,
        "Expert parallelism, which also splits the batch.",
        low=-1,
        free=True,
        needs=("parallel.preset", "custom"),
    ),
    "parallel.mesh.context": Key(
        1,
        "Context parallelism: shards of every sequence.",
        low=-1,
        free=True,
        needs=("parallel.preset", "custom"),
    ),
    "parallel.mesh.tensor": Key(
        1,
        "Tensor parallelism over heads, feed-forward width and vocabulary.",
        low=-1,
        free=True,
        needs=("parallel.preset", "custom"),
    ),
    "parallel.context_attention": Key(
        "auto",
        "Attention under context parallelism: ring attention, or all-gathered keys and values; "
        "auto: ring if the attention kernel supports it.",
        choices=("auto", "ring", "gather"),
        free=True,
        needs=("parallel.mesh.context",),
    ),
    "parallel.sequence": Key(
        True,
        "Sequence parallelism: shard activations between sublayers along the sequence over tensor.",
        free=True,
        needs=("parallel.mesh.tensor",),
    ),
    "parallel.pipeline.microbatches": Key(
        0,
        "Pipeline microbatches per batch; 0: the number of stages.",
        low=0,
        free=True,
        needs=("parallel.mesh.stage",),
    ),
    "parallel.pipeline.repeats": Key(
        1,
        "Passes of each microbatch through all stages (circular schedule).",
        low=1,
        free=True,
        needs=("parallel.mesh.stage",),
    ),
    # --- logging
    "log.every_steps": Key(1, "Write metrics.jsonl every n steps.", low=1, free=True),
    "log.tensorboard": Key(True, "Also write TensorBoard event files.", free=True),
    "log.trackers": Key(
        "",
        "Additional trackers, comma-separated: wandb, mlflow, trackio. They write into the "
        "workdir, offline, unless their own environment variables override this.",
        free=True,
    ),
}
