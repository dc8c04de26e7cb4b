"""Keys of the model."""

from __future__ import annotations

from lm.config.registry import Key

MODEL_KEYS: dict[str, Key] = {
    "model.family": Key("decoder", "Kind of model."),
    "model.n_layers": Key(4, "Layers: Transformer blocks, or recurrent layers.", low=1),
    "model.n_decoder_layers": Key(0, "Layers of the decoder; 0: n_layers.", low=0),
    "model.d_model": Key(128, "Width of the residual stream.", low=1),
    "model.n_heads": Key(4, "Query heads.", low=1),
    "model.n_kv_heads": Key(0, "Key/value heads (grouped-query); 0: as many as n_heads.", low=0),
    "model.head_dim": Key(0, "Dimension of a head; 0: d_model / n_heads.", low=0),
    "model.d_ff": Key(0, "Width of the feed-forward layer; 0: 4 d_model.", low=0),
    "model.vocab_size": Key(0, "Rows of the token table; 0: the tokenizer's size.", low=0),
    "model.max_length": Key(0, "Longest context; 0: data.sequence_length.", low=0),
    "model.residual": Key(
        "sum",
        "How a block's output h joins the residual stream H: H + h, or concat(H, h W), which makes "
        "each block wider than the one before it by concat_width.",
        choices=("sum", "concat"),
    ),
    "model.concat_width": Key(32, "Columns g of W [d_model, g] of model.residual=concat.", low=1),
    "model.mixer": Key("attention", "Token mixer of a Transformer block."),
    "model.norm": Key("layernorm", "Normalisation.", choices=("layernorm", "rmsnorm")),
    "model.norm_eps": Key(1e-5, "Epsilon inside the normalisation.", low=0.0, high=1.0),
    "model.norm_placement": Key(
        "pre",
        "Normalise before each sublayer, after the sum, or before and after it (Gemma 2).",
        choices=("pre", "post", "both"),
    ),
    "model.norm_unit_offset": Key(False, "Norms multiply by 1 + scale, which starts at 0 (Gemma)."),
    "model.norm_bias": Key(True, "LayerNorm has a bias."),
    "model.embedding_norm": Key(False, "Normalise the sum of the embeddings (BERT)."),
    "model.bias": Key(True, "Linear layers have biases."),
    "model.attention_bias": Key(
        "same",
        "Biases of attention: as model.bias says, all, of queries, keys and values (Qwen2), none.",
        choices=("same", "all", "qkv", "none"),
    ),
    "model.qk_norm": Key(False, "Normalise queries and keys over each head (Qwen3)."),
    "model.attention_scale": Key(
        0.0, "Factor of attention scores (T5: 1); 0: 1 / sqrt(head_dim).", low=0.0
    ),
    "model.attention_softcap": Key(
        0.0, "Attention scores x become cap tanh(x / cap) (Gemma 2); 0: they stay.", low=0.0
    ),
    "model.window": Key(
        0, "Local layers of a decoder see so many last tokens, their own included; 0: all.", low=0
    ),
    "model.global_every": Key(
        0,
        "Where there is a window, layers n, 2n, … of 1, 2, … are global and the others local: "
        "Gemma 2 and GPT-3 2, Gemma 3 6; 0: all are local.",
        low=0,
    ),
    "model.positions": Key(
        "learned",
        "Position information; relative: T5's bias of attention scores; alibi: a bias that falls "
        "with the distance, at a fixed slope a head (Press et al. 2022).",
        choices=("learned", "sinusoidal", "rotary", "relative", "alibi", "none"),
    ),
    "model.position_offset": Key(0, "Row of the position table for position 0 (RoBERTa).", low=0),
    "model.relative_buckets": Key(32, "Rows of the relative position table.", low=4),
    "model.relative_max_distance": Key(128, "Distance from which all share a bucket.", low=4),
    "model.token_types": Key(0, "Segment embeddings (BERT); 0: none.", low=0),
    "model.rope_theta": Key(10_000.0, "Base of the rotary wavelengths.", low=1.0),
    "model.rope_theta_local": Key(
        0.0,
        "Base of the rotary wavelengths of local layers, which rope_scaling then leaves as they "
        "are (Gemma 3); 0: local layers rotate as global ones.",
        low=0.0,
    ),
    "model.rope_scaling": Key(
        "none",
        "Rotary wavelengths times rope_factor: of all, or of the long ones (Llama 3.1).",
        choices=("none", "linear", "llama3"),
    ),
    "model.rope_factor": Key(1.0, "What rope_scaling stretches wavelengths by.", low=1.0),
    "model.rope_low_frequency": Key(
        1.0, "llama3: fewer turns than this in rope_original_length are stretched whole.", low=1e-6
    ),
    "model.rope_high_frequency": Key(
        4.0, "llama3: more turns than this in rope_original_length stay.", low=1e-6
    ),
    "model.rope_original_length": Key(8192, "llama3: context before the stretching.", low=1),
    "model.activation": Key(
        "gelu_tanh",
        "Non-linearity; the glu ones are gated (two input projections).",
        choices=("relu", "gelu_tanh", "gelu_erf", "swiglu", "geglu"),
    ),
    "model.n_experts": Key(
        0, "Experts of a feed-forward layer (Switch, Mixtral); 0: plain layers.", low=0
    ),
    "model.experts_per_token": Key(2, "Experts that a token uses: 1 Switch, 2 Mixtral.", low=1),
    "model.experts_every": Key(
        1, "Every so many layers the last one has experts; the others are plain.", low=1
    ),
    "model.dense_layers": Key(
        0, "Layers before the first one with experts, all of them plain (DeepSeek).", low=0
    ),
    "model.expert_capacity": Key(
        0.0,
        "Tokens of a row that an expert takes in training, over the even share; later ones pass it "
        "by. 0: it takes all. Evaluation and decoding drop nothing.",
        low=0.0,
    ),
    "model.balance_loss": Key(
        0.01, "Weight of the load-balancing loss of each layer of experts (Switch).", low=0.0
    ),
    "model.router_z_loss": Key(
        0.0, "Weight of the routers' squared log-partition, each layer (ST-MoE).", low=0.0
    ),
    "model.router_jitter": Key(
        0.0, "In training a router's input is multiplied by 1 ± this (Switch).", low=0.0, high=0.99
    ),
    "model.router_bias_rate": Key(
        0.0,
        "What each microbatch adds to or subtracts from the bias that a router adds to the "
        "probability of an expert when it chooses, so that loads become even; 0: no bias "
        "(DeepSeek-V3, with model.balance_loss=0).",
        low=0.0,
    ),
    "model.tie_embeddings": Key(True, "The output projection is the token table."),
    "model.scale_embeddings": Key(False, "Multiply embeddings by sqrt(d_model)."),
    "model.scale_logits": Key(False, "Divide tied logits by sqrt(d_model) (T5)."),
    "model.logit_softcap": Key(
        0.0, "Logits x become cap tanh(x / cap) (Gemma 2); 0: they stay.", low=0.0
    ),
    "model.mup_base_width": Key(
        0,
        "muP (Yang et al. 2022): the d_model at which this is the plain model, and from which best "
        "learning rates carry over to others; d_ff grows with d_model. 0: plain at every width.",
        low=0,
    ),
    "model.mup_base_head_dim": Key(
        0, "head_dim at mup_base_width; 0: head_dim, wider models have more heads.", low=0
    ),
    "model.n_classes": Key(0, "Outputs of classification; 0: the number of data.labels.", low=0),
    "model.d_hidden": Key(
        0, "Units of a recurrent layer, both directions together, or of NPLM; 0: d_model.", low=0
    ),
    "model.pooling": Key(
        "family",
        "What stands for a text of a Transformer: BERT's layer over the first token and elsewhere "
        "the last token, or the mean of its tokens.",
        choices=("family", "mean"),
    ),
    "model.bidirectional": Key(False, "Recurrent encoders and classifiers read both ways."),
    "model.context": Key(4, "Words that NPLM sees before the predicted one.", low=1),
    "model.direct": Key(False, "NPLM's direct connections from embeddings to output."),
    "model.carry": Key(
        False, "Recurrent state passes from one batch to the next; needs data.order=contiguous."
    ),
    "model.dropout": Key(0.0, "Dropout of embeddings and sublayer outputs.", low=0.0, high=0.99),
    "model.activation_dropout": Key(0.0, "Dropout inside the feed-forward.", low=0.0, high=0.99),
    "model.final_dropout": Key(False, "Dropout after the final norm of a stack too (T5)."),
    "model.attention_dropout": Key(0.0, "Dropout of attention weights.", low=0.0, high=0.99),
    "model.init": Key(
        "normal",
        "Deviation of fresh kernels: init_std, 1/sqrt(inputs), or sqrt(2/(inputs + outputs)); "
        "tables have init_std; uniform: not Transformers, everything in ± init_std.",
        choices=("normal", "fan_in", "xavier", "uniform"),
    ),
    "model.init_std": Key(0.02, "Deviation of the normal initialisation.", low=0.0, high=10.0),
    "model.init_scale": Key(
        1.0, "The fan_in deviation is sqrt(this/inputs); Switch has 0.1.", low=0.0, high=100.0
    ),
    "model.init_truncated": Key(
        False, "Nothing beyond two deviations is drawn (BERT, Switch); the rest has 0.88 of them."
    ),
    "model.scale_residual_init": Key(
        True, "Divide the init_std of residual output projections by sqrt(2 n_layers) (GPT-2)."
    ),
    "model.dtype": Key(
        "auto",
        "Compute type; auto: bfloat16 on TPU and GPU, float32 on CPU. Parameters stay float32.",
        choices=("auto", "float32", "bfloat16"),
    ),
    "model.attention": Key(
        "auto",
        "Attention kernel: plain XLA; tiles that skip the masked half (for CPUs); blockwise: the "
        "scores of one tile at a time; splash (TPU) and cudnn (GPU): fused; auto: the platform's "
        "own if it can run, else xla.",
        choices=("auto", "xla", "tiled", "blockwise", "splash", "cudnn"),
        free=True,
    ),
}
