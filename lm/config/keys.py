"""Configuration keys of the model, the data, what is learned and how a run proceeds.

The options of single objectives, optimizers and schedules are declared in `registries.py`.
"""

from __future__ import annotations

from lm.config.registry import Key

KEPT = ("auto", "float32", "bfloat16", "int8")  # dtypes of what decoding reads; weights: int4 too
LIBRARY_OPTIMIZERS = (  # not those of plug-ins
    *("adamw", "adafactor", "sgd", "lion", "muon", "ademamix", "schedule_free", "soap"),
)
COMMON_KEYS: dict[str, Key] = {
    "seed": Key(0, "Seed of initialisation, dropout and data order.", low=0, high=2**31 - 1),
    "paper": Key("", "Name of the published model that this configuration reproduces.", free=True),
    # --- model
    "model.family": Key("decoder", "Kind of model."),
    "model.n_layers": Key(4, "Layers: Transformer blocks, or recurrent layers.", low=1),
    "model.n_decoder_layers": Key(
        0,
        "Layers of the decoder; 0: n_layers.",
        low=0,
        needs=("model.family", "encoder_decoder", "lstm_encoder_decoder"),
    ),
    "model.d_model": Key(128, "Width of the residual stream.", low=1),
    "model.n_heads": Key(4, "Query heads.", low=1),
    "model.n_kv_heads": Key(0, "Key/value heads (grouped-query); 0: as many as n_heads.", low=0),
    "model.head_dim": Key(0, "Dimension of a head; 0: d_model / n_heads.", low=0),
    "model.d_ff": Key(0, "Width of the feed-forward layer; 0: 4 d_model.", low=0),
    "model.vocab_size": Key(
        0,
        "Rows of the token table; 0: the tokenizer's size. Tokens that data.added_tokens adds get "
        "rows too.",
        low=0,
    ),
    "model.max_length": Key(0, "Longest context; 0: data.sequence_length.", low=0),
    "model.residual": Key(
        "sum",
        "How a block's output h joins the residual stream H: H + h, or concat(H, h W), which makes "
        "each block wider than the one before it by concat_width.",
        choices=("sum", "concat"),
    ),
    "model.concat_width": Key(
        32,
        "Columns g of W [d_model, g] of model.residual=concat.",
        low=1,
        needs=("model.residual", "concat"),
    ),
    "model.mixer": Key("attention", "Token mixer of a Transformer block."),
    "model.norm": Key("layernorm", "Normalisation.", choices=("layernorm", "rmsnorm")),
    "model.norm_eps": Key(1e-5, "Epsilon inside the normalisation.", low=1e-20, high=1.0),
    "model.norm_placement": Key(
        "pre",
        "Normalise the input of each sublayer, the sum, input and output (Gemma 2), or the output "
        "alone (OLMo 2).",
        choices=("pre", "post", "both", "output"),
    ),
    "model.norm_unit_offset": Key(False, "Norms multiply by 1 + scale, which starts at 0 (Gemma)."),
    "model.norm_bias": Key(True, "LayerNorm has a bias.", needs=("model.norm", "layernorm")),
    "model.embedding_norm": Key(False, "Normalise the sum of the embeddings (BERT)."),
    "model.bias": Key(True, "Linear layers have biases."),
    "model.attention_bias": Key(
        "same",
        "Biases of attention: as model.bias says, all, of queries, keys and values (Qwen2), none.",
        choices=("same", "all", "qkv", "none"),
    ),
    "model.qk_norm": Key(False, "Normalise queries and keys."),
    "model.qk_norm_over": Key(
        "head",
        "What qk_norm normalises over: each head (Qwen3), or all heads of a token together "
        "(OLMo 2).",
        choices=("head", "all"),
        needs=("model.qk_norm",),
    ),
    "model.attention_scale": Key(
        0.0, "Factor of attention scores (T5: 1); 0: 1 / sqrt(head_dim).", low=0.0
    ),
    "model.attention_softcap": Key(
        0.0, "Attention scores x become cap tanh(x / cap) (Gemma 2); 0: they stay.", low=0.0
    ),
    "model.attention_sinks": Key(
        False,
        "Each head has a logit that takes part in the softmax and has no value, so that a token "
        "may attend to nothing (gpt-oss).",
    ),
    "model.window": Key(
        0, "Local layers of a decoder see so many last tokens, their own included; 0: all.", low=0
    ),
    "model.window_chunks": Key(
        False,
        "Texts are cut into chunks of model.window tokens, and local layers see the start of a "
        "token's own chunk instead of the last tokens (Llama 4).",
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
    "model.position_offset": Key(
        0,
        "Row of the position table for position 0 (RoBERTa).",
        low=0,
        needs=("model.positions", "learned"),
    ),
    "model.relative_buckets": Key(
        32, "Rows of the relative position table.", low=4, needs=("model.positions", "relative")
    ),
    "model.relative_max_distance": Key(
        128, "Distance from which all share a bucket.", low=4, needs=("model.positions", "relative")
    ),
    "model.token_types": Key(0, "Segment embeddings (BERT); 0: none.", low=0),
    "model.nope_every": Key(
        0,
        "Layers n, 2n, … of 1, 2, … have no rotary positions (NoPE): SmolLM3 and Llama 4 4; 0: all "
        "have them.",
        low=0,
        needs=("model.positions", "rotary"),
    ),
    "model.nope_temperature": Key(
        0.0,
        "In layers without positions the query at position i is multiplied by 1 + x ln(1 + "
        "floor((i + 1) / nope_temperature_length)), x being this (Llama 4: 0.1).",
        low=0.0,
        needs=("model.nope_every",),
    ),
    "model.nope_temperature_length": Key(
        8192,
        "Tokens up to which queries keep their size.",
        low=1,
        needs=("model.nope_temperature",),
    ),
    "model.rope_theta": Key(
        10_000.0, "Base of the rotary wavelengths.", low=1.0, needs=("model.positions", "rotary")
    ),
    "model.rope_theta_local": Key(
        0.0,
        "Base of the rotary wavelengths of local layers, which rope_scaling then leaves as they "
        "are (Gemma 3); 0: local layers rotate as global ones.",
        low=0.0,
    ),
    "model.rope_fraction": Key(
        1.0,
        "Part of a head that is rotated, the first of its numbers (StableLM 0.25).",
        low=0.0,
        high=1.0,
        needs=("model.positions", "rotary"),
    ),
    "model.rope_norm": Key(
        False,
        "Normalise each head of queries and keys by its root mean square once it is rotated, "
        "without a scale; layers without positions do not (Llama 4).",
        needs=("model.positions", "rotary"),
    ),
    "model.rope_scaling": Key(
        "none",
        "Rotary wavelengths times rope_factor: of all, or of the long ones (llama3: Llama 3.1; "
        "yarn: YaRN); dynamic: more the longer a text is; longrope: times factors for each (Phi).",
        choices=("none", "linear", "llama3", "yarn", "dynamic", "longrope"),
        needs=("model.positions", "rotary"),
    ),
    "model.rope_factor": Key(
        1.0, "What rope_scaling stretches wavelengths by.", low=1.0, needs=("model.rope_scaling",)
    ),
    "model.rope_low_frequency": Key(
        1.0,
        "llama3, yarn (beta_slow): fewer turns than this in rope_original_length are stretched "
        "whole.",
        low=1e-6,
        needs=("model.rope_scaling", "llama3", "yarn"),
    ),
    "model.rope_high_frequency": Key(
        4.0,
        "llama3, yarn (beta_fast; YaRN has 32): more turns than this in rope_original_length stay.",
        low=1e-6,
        needs=("model.rope_scaling", "llama3", "yarn"),
    ),
    "model.rope_original_length": Key(
        8192,
        "Context before the stretching.",
        low=1,
        needs=("model.rope_scaling", "llama3", "yarn", "dynamic", "longrope"),
    ),
    "model.rope_attention_factor": Key(
        0.0,
        "yarn, longrope: factor of rotated queries and keys; 0: by rope_factor, as the papers do.",
        low=0.0,
        needs=("model.rope_scaling", "yarn", "longrope"),
    ),
    "model.rope_truncate": Key(
        True,
        "yarn: stretch between whole indices of wavelengths.",
        needs=("model.rope_scaling", "yarn"),
    ),
    "model.rope_short_factor": Key(
        (),
        "longrope: factors, one a wavelength (half of what is rotated of a head), up to "
        "rope_original_length.",
        needs=("model.rope_scaling", "longrope"),
    ),
    "model.rope_long_factor": Key(
        (),
        "longrope: such factors of texts longer than that.",
        needs=("model.rope_scaling", "longrope"),
    ),
    "model.activation": Key(
        "gelu_tanh",
        "Non-linearity; the glu ones are gated (two input projections); swiglu_clipped: gate g of "
        "at most 7 and input x within 7, g sigmoid(1.702 g) (x + 1) (gpt-oss).",
        choices=("relu", "gelu_tanh", "gelu_erf", "swiglu", "geglu", "swiglu_clipped"),
    ),
    "model.n_experts": Key(
        0, "Experts of a feed-forward layer (Switch, Mixtral); 0: plain layers.", low=0
    ),
    "model.experts_per_token": Key(
        2, "Experts that a token uses: 1 Switch, 2 Mixtral.", low=1, needs=("model.n_experts",)
    ),
    "model.experts_every": Key(
        1,
        "Every so many layers the last one has experts; the others are plain.",
        low=1,
        needs=("model.n_experts",),
    ),
    "model.expert_d_ff": Key(
        0, "Width of an expert; 0: d_ff, that of plain layers.", low=0, needs=("model.n_experts",)
    ),
    "model.expert_weights": Key(
        "auto",
        "Weights of a token's experts: their probabilities among all (Switch, OLMoE), or those "
        "over their sum (Mixtral, Qwen3); auto: probability of one, normalized of several.",
        choices=("auto", "probability", "normalized"),
        needs=("model.n_experts",),
    ),
    "model.expert_weights_scale": Key(
        1.0, "Factor of these weights (DeepSeek).", low=0.0, needs=("model.n_experts",)
    ),
    "model.expert_weights_input": Key(
        False,
        "These weights multiply the input of an expert instead of its output (Llama 4).",
        needs=("model.n_experts",),
    ),
    "model.router_scores": Key(
        "softmax",
        "Scores of experts: their probabilities, or the sigmoid of each logit (DeepSeek-V3).",
        choices=("softmax", "sigmoid"),
        needs=("model.n_experts",),
    ),
    "model.expert_groups": Key(
        0,
        "Groups of neighbouring experts, of which a token uses expert_groups_per_token (DeepSeek); "
        "0: it may use all experts.",
        low=0,
        needs=("model.n_experts",),
    ),
    "model.expert_groups_per_token": Key(
        0,
        "Groups that the experts of a token are chosen from.",
        low=0,
        needs=("model.expert_groups",),
    ),
    "model.expert_group_best": Key(
        1,
        "Largest scores of a group that are added up to choose groups: 1 DeepSeek-V2, 2 V3.",
        low=1,
        needs=("model.expert_groups",),
    ),
    "model.shared_expert_d_ff": Key(
        0,
        "Width of an expert that every token uses beside its own; 0: none.",
        low=0,
        needs=("model.n_experts",),
    ),
    "model.shared_expert_gate": Key(
        False,
        "Multiply the shared expert's output by a sigmoid of the token (Qwen2-MoE).",
        needs=("model.shared_expert_d_ff",),
    ),
    "model.dense_layers": Key(
        0, "Layers before the first one with experts, all of them plain (DeepSeek).", low=0
    ),
    "model.expert_capacity": Key(
        0.0,
        "Tokens of a row that an expert takes in training, over the even share; later ones pass it "
        "by. 0: it takes all. Evaluation and decoding drop nothing.",
        low=0.0,
        needs=("model.n_experts",),
    ),
    "model.balance_loss": Key(
        0.01,
        "Weight of the load-balancing loss of each layer of experts (Switch).",
        low=0.0,
        needs=("model.n_experts",),
    ),
    "model.router_z_loss": Key(
        0.0,
        "Weight of the routers' squared log-partition, each layer (ST-MoE).",
        low=0.0,
        needs=("model.n_experts",),
    ),
    "model.router_jitter": Key(
        0.0,
        "In training a router's input is multiplied by 1 ± this (Switch).",
        low=0.0,
        high=0.99,
        needs=("model.n_experts",),
    ),
    "model.router_bias": Key(
        False, "Routers have a bias that is learnt (gpt-oss).", needs=("model.n_experts",)
    ),
    "model.router_bias_rate": Key(
        0.0,
        "What each microbatch adds to or subtracts from the bias that a router adds to the "
        "probability of an expert when it chooses, so that loads become even; 0: no bias "
        "(DeepSeek-V3, with model.balance_loss=0).",
        low=0.0,
        needs=("model.n_experts",),
    ),
    "model.tie_embeddings": Key(True, "The output projection is the token table."),
    "model.scale_embeddings": Key(False, "Multiply embeddings by sqrt(d_model)."),
    "model.embedding_multiplier": Key(
        1.0, "Factor of the embeddings of tokens (Granite).", low=1e-6, high=1e6
    ),
    "model.residual_multiplier": Key(
        1.0, "Factor of the output of each sublayer (Granite).", low=1e-6, high=1e6
    ),
    "model.logits_scaling": Key(
        1.0, "What the logits of the vocabulary are divided by (Granite).", low=1e-6, high=1e6
    ),
    "model.scale_logits": Key(
        False, "Divide tied logits by sqrt(d_model) (T5).", needs=("model.tie_embeddings", "True")
    ),
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
    "model.n_classes": Key(
        0,
        "Outputs of classification; 0: the number of data.labels.",
        low=0,
        needs=("objective.name", "classification", "token_classification", "reward"),
    ),
    "model.d_hidden": Key(
        0,
        "Units of a recurrent layer, both directions together, or of NPLM; 0: d_model.",
        low=0,
        needs=("model.family", "lstm", "lstm_encoder_decoder", "nplm"),
    ),
    "model.pooling": Key(
        "family",
        "What stands for a text of a Transformer: BERT's layer over the first token and elsewhere "
        "the last token, or the mean of its tokens.",
        choices=("family", "mean"),
        needs=("objective.name", "classification", "reward"),
    ),
    "model.bidirectional": Key(
        False,
        "Recurrent encoders and classifiers read both ways.",
        needs=("model.family", "lstm", "lstm_encoder_decoder"),
    ),
    "model.context": Key(
        4, "Words that NPLM sees before the predicted one.", low=1, needs=("model.family", "nplm")
    ),
    "model.direct": Key(
        False,
        "NPLM's direct connections from embeddings to output.",
        needs=("model.family", "nplm"),
    ),
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
        1.0,
        "The fan_in deviation is sqrt(this/inputs); Switch has 0.1.",
        low=0.0,
        high=100.0,
        needs=("model.init", "fan_in"),
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
        "scores of one tile at a time; splash, flash (TPU), cudnn, tokamax, triton (GPU): fused; "
        "auto: the platform's own if it can run, else xla.",
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
        "parquet:FILE, arrow:FOLDER, datasets:NAME, parallel:FILE|FILE, squad:FILE, conll:FILE.",
    ),
    "data.weights": Key((), "Mixture weights of the corpora; (): by tokens."),
    "data.schedule": Key(
        "",
        "Mixture weights that change: STEP: WEIGHT WEIGHT …; STEP: …, linear in between, at once "
        "where a step stands twice.",
    ),
    "data.epochs": Key((), "Passes over each corpus, in proportion, instead of weights."),
    "data.directory": Key(
        "", "Where relative paths start; empty: $LM_DATA_DIR, else the current folder.", free=True
    ),
    "data.field": Key(
        "text",
        "Field or column that holds the text; dots lead into nested ones (meta.text).",
        needs=("data.source", "jsonl", "tfds", "parquet", "arrow", "datasets"),
    ),
    "data.documents": Key(
        "file", "A text file's document.", choices=("file", "line"), needs=("data.source", "text")
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
        "Token between the documents of token files (nanogpt), an id or an entry of the "
        "vocabulary; empty: the tokenizer's end; none: they are one document.",
        needs=("data.source", "nanogpt"),
    ),
    "data.validation_source": Key("", "Corpora for validation, written as data.source."),
    "data.test_source": Key("", "Corpora for `lm eval --split test`.", free=True),
    "data.columns": Key(
        "", "Columns of records by role, such as text=sentence,label=label; numbers count from 0."
    ),
    "data.header": Key(
        True,
        "TSV and CSV files start with the names of their columns.",
        needs=("data.source", "tsv", "csv"),
    ),
    "data.bad_rows": Key("error", "A bad row is an error, or skipped.", choices=("error", "skip")),
    "data.canaries": Key(
        0,
        "Random lines planted in the first training corpus; lm eval --safety tells how far they "
        "are memorised.",
        low=0,
        high=10_000,
        needs=("objective.name", "causal", "prefix", "masked", "span_corruption"),
    ),
    "data.canary_format": Key(
        "the random number is ######",
        "A canary; # is a random digit.",
        needs=("data.canaries",),
    ),
    "data.canary_repeats": Key(
        (1.0,),
        "How often a canary is planted, in turn: 1,4,16 plants a third of them each so often.",
        needs=("data.canaries",),
    ),
    "data.labels": Key(
        "",
        "Names of the classes, comma-separated; empty: a number is learnt.",
        needs=("objective.name", "classification", "token_classification"),
    ),
    "data.target_length": Key(0, "Tokens of a target sequence; 0: data.sequence_length.", low=0),
    "data.doc_stride": Key(
        128,
        "Tokens from one window of a long context to the next.",
        low=1,
        needs=("objective.name", "span_qa"),
    ),
    "data.pack": Key(True, "Several short pairs share a row."),
    "data.order": Key(
        "shuffled",
        "Order of training windows; contiguous: row r of a batch goes on where it was before.",
        choices=("shuffled", "contiguous"),
    ),
    "data.validation_fraction": Key(
        0.0,
        "Part held out where there is no validation source: random documents or records, or the "
        "end of the only document.",
        low=0.0,
        high=0.9,
    ),
    "data.tokenizer": Key(
        "byte",
        "byte, char, words (of the corpus), words:FILE, sentencepiece (trained on the corpus), "
        "sentencepiece:FILE, tokenizers:FILE.json, gpt2:FOLDER, folder:DIR (of a model), "
        "run:WORKDIR (that of a run).",
    ),
    "data.tokenizer_vocab_size": Key(
        4096,
        "Pieces of a SentencePiece model trained on the corpus; most words of words.",
        low=2,
        needs=("data.tokenizer", "sentencepiece", "words"),
    ),
    "data.tokenizer_min_count": Key(
        1,
        "Rarer words are unknown to the words tokenizer.",
        low=1,
        needs=("data.tokenizer", "words"),
    ),
    "data.lowercase": Key(
        False, "The words tokenizer lower-cases.", needs=("data.tokenizer", "words")
    ),
    "data.added_tokens": Key(
        "",
        "Special tokens added to the vocabulary, comma-separated; template: those that the shipped "
        "chat template writes, unless the tokenizer has one of its own; empty: that for "
        "objectives that learn from conversations, none for others.",
    ),
    "data.chat_template": Key(
        "", "Jinja file of the chat template; empty: the tokenizer's, else the shipped one."
    ),
    "data.chat_markers": Key(
        False,
        "Read names of special tokens in messages as these tokens, as transformers does; otherwise "
        "they are characters, so that no text can end a turn.",
    ),
    "data.sequence_length": Key(256, "Tokens of an example.", low=1),
    "data.stride": Key(
        0, "Training windows start every so many tokens; 0: where the last one ended.", low=0
    ),
    "data.isolate_documents": Key(True, "Attention and positions stay within a document."),
    "data.batch_size": Key(8, "Sequences of a step, over all devices.", low=1),
    "data.batch_ramp": Key(
        "",
        "Sequences of a step while a run is young, STEP: SIZE; STEP: SIZE; …, from 0 to batch_size "
        "(GPT-3: 0: 16; 1000: 32; …).",
    ),
    "data.length_ramp": Key(
        "",
        "Tokens of an example while a run is young, its first ones, STEP: LENGTH; …, from 0 to "
        "sequence_length.",
        needs=("objective.name", "causal", "distillation"),
    ),
    "data.cache_directory": Key(
        "",
        "Folder, or URL in a bucket, of token stores; empty: $LM_CACHE_DIR, else ~/.cache/lm.",
        free=True,
    ),
    "data.shard_cache": Key(
        100.0, "GiB of local disk for what is read of stores in a bucket.", low=0.0, free=True
    ),
    "data.workers": Key(0, "Processes that tokenise; 0: one a core.", low=0, high=1024, free=True),
    "data.prefetch": Key(2, "Batches prepared ahead.", low=1, high=1024, free=True),
    # --- objective
    "objective.name": Key("causal", "What is learnt."),
    "objective.label_smoothing": Key(
        0.0, "Part of a target's probability spread over the vocabulary.", low=0.0, high=0.99
    ),
    "objective.z_loss": Key(0.0, "Weight of the squared log-partition (T5, PaLM).", low=0.0),
    # --- start from other weights
    "init.from": Key(
        "", "Run whose parameters this one starts from: its workdir, or RUN/checkpoints/STEP."
    ),
    "init.average": Key(1, "Average its last so many checkpoints.", low=1, needs=("init.from",)),
    "init.fresh": Key("", "Patterns of parameters that stay fresh, comma-separated."),
    "init.leave": Key(
        "", "Patterns of its parameters that are not used, comma-separated.", needs=("init.from",)
    ),
    "init.rename": Key(
        "", "Its parameters' new names: PATTERN=>NAME, comma-separated.", needs=("init.from",)
    ),
    "init.vectors": Key("", "GloVe file for the token table of the words tokenizer."),
    # --- low-rank adaptation
    "lora.rank": Key(0, "Rank of the trained updates (Hu et al. 2021); 0: off.", low=0),
    "lora.alpha": Key(16.0, "Updates are scaled by alpha / rank.", low=1e-6, needs=("lora.rank",)),
    "lora.targets": Key(
        "attention/(query|value)/kernel", "Pattern of the adapted kernels.", needs=("lora.rank",)
    ),
    "lora.base": Key(
        "float32",
        "Dtype that the layers' frozen matrices are kept in; int8 has a scale for each output.",
        choices=("float32", "int8"),
        needs=("lora.rank",),
    ),
    "lora.train": Key("", "Patterns of other parameters that train too, comma-separated."),
    # --- optimizer
    "optimizer.freeze": Key(
        "",
        "Patterns of parameters that do not train, comma-separated; a single layer is matched by "
        "layers/3/.",
    ),
    "optimizer.layer_decay": Key(
        1.0, "Learning rate of a layer over that of the next one up.", low=1e-6, high=1.0
    ),
    "optimizer.rates": Key(
        "",
        "Factors of the learning rate of parameters, PATTERN=>FACTOR, comma-separated; patterns as "
        "of optimizer.freeze.",
    ),
    "optimizer.name": Key("adamw", "Update rule."),
    "optimizer.learning_rate": Key(1e-3, "Peak learning rate.", low=0.0, high=1e6),
    "optimizer.weight_decay": Key(0.1, "Decoupled weight decay, times the learning rate.", low=0.0),
    "optimizer.decay": Key(
        "matrices",
        "What decays: kernels and embeddings, kernels only, or every parameter.",
        choices=("matrices", "kernels", "all"),
    ),
    "optimizer.moments": Key(
        "float32",
        "Dtype that the moments of weight matrices are kept in; int8 has a scale for each row.",
        choices=("float32", "bfloat16", "int8"),
    ),
    "optimizer.cautious": Key(
        "none",
        "Move only where the update goes down the gradient (updates; Liang et al. 2024), decay "
        "only where it goes to zero (decay; Chen et al. 2025), or both.",
        choices=("none", "updates", "decay", "both"),
        needs=("optimizer.name", *LIBRARY_OPTIMIZERS),
    ),
    "optimizer.ema": Key(
        0.0,
        "Decay of an average of the parameters, bias-corrected, which is what is evaluated, saved "
        "and exported; 0: the parameters themselves are.",
        low=0.0,
        high=0.999999,
    ),
    "optimizer.clip_norm": Key(1.0, "Largest global gradient norm; 0: no clipping.", low=0.0),
    # --- schedule
    "schedule.name": Key("cosine", "Learning rate after the warm-up."),
    "schedule.warmup_steps": Key(0, "Steps of linear warm-up.", low=0),
    "schedule.hold_steps": Key(0, "Steps at the peak before any decay.", low=0),
    "schedule.decay_steps": Key(
        0,
        "Step at which cosine, linear, inverse and wsd reach the last rate; 0: train.steps.",
        low=0,
        needs=("schedule.name", "cosine", "linear", "inverse", "wsd"),
    ),
    "schedule.final_ratio": Key(
        0.1,
        "Last learning rate over the peak.",
        low=0.0,
        high=1.0,
        needs=("schedule.name", "cosine", "linear", "inverse", "wsd"),
    ),
    # --- training
    "train.steps": Key(1000, "Optimizer updates.", low=1),
    "train.microbatches": Key(1, "Parts of a batch whose gradients are summed.", low=1),
    "train.remat": Key(
        "none",
        "What the backward pass recomputes: nothing, all but matmul results, or everything; "
        "offload_dots: matmul results wait in the host's memory, offload: the input of each "
        "layer does, and everything else is recomputed.",
        choices=("none", "dots", "full", "offload_dots", "offload"),
        free=True,
    ),
    "train.scan_unroll": Key(
        1, "Layers inlined in one turn of the scan over layers; 0: all.", low=0, free=True
    ),
    "train.loss_chunk": Key(
        0, "Columns of a batch whose logits a device has at once; 0: all.", low=0, free=True
    ),
    "train.steps_per_dispatch": Key(
        1, "Steps run by one call of the compiled program.", low=1, high=1000
    ),
    "train.nonfinite": Key(
        "halt",
        "Loss or gradient not finite: stop with the last good state, or skip the update.",
        choices=("halt", "skip"),
        free=True,
    ),
    "train.stop_at": Key(
        0,
        "Stop with a saved state and exit code 75 at this step, or where the dispatch that reaches "
        "it ends (train.steps_per_dispatch); 0: never.",
        low=0,
        free=True,
    ),
    "train.stall_seconds": Key(
        1800.0,
        "A run in which nothing happens for so long ends with an error; 0: never.",
        low=0.0,
        free=True,
    ),
    "train.precision": Key(
        "none",
        "Training with products of the layers' matrices in 8 bits, scaled by row; or (qat) with "
        "weights rounded by decode.weights, passing gradients straight through.",
        choices=("none", "int8", "fp8", "qat"),
    ),
    "train.profile": Key(
        "",
        "START:STEPS: trace these steps, the first counted from 0, for xprof and Perfetto, to "
        "WORKDIR/profile, with a profile of the devices' memory.",
        free=True,
    ),
    # --- evaluation
    "eval.every_steps": Key(
        0, "Validate every so many steps; 0: only at the end.", low=0, free=True
    ),
    "eval.by_source": Key(
        False, "The loss of each validation corpus too, by another pass over it.", free=True
    ),
    "eval.batch_size": Key(
        0, "Sequences of a validation batch; 0: data.batch_size.", low=0, free=True
    ),
    "eval.max_batches": Key(
        0, "Validation batches during training; 0: the whole split.", low=0, free=True
    ),
    "eval.final_batches": Key(0, "The same after the last step.", low=0, free=True),
    "eval.metrics": Key(
        "",
        "Metrics of `lm eval --task`, comma-separated; empty: the usual of the objective.",
        free=True,
    ),
    "eval.best": Key(
        "", "Keep the best checkpoint by this validation figure too, such as accuracy or -loss."
    ),
    "eval.safety": Key(
        "",
        "Safety sets that are run with the validation, comma-separated (lm eval --safety lists "
        "them); empty: none.",
        free=True,
    ),
    "eval.safety_every": Key(
        0,
        "Run them at validations at every so many steps, and at the last; 0: at each.",
        low=0,
        free=True,
        needs=("eval.safety",),
    ),
    "eval.harness": Key(
        "",
        "Tasks of lm-eval, or their YAML files, that are run with the validation, comma-separated; "
        "empty: none.",
        free=True,
    ),
    "eval.harness_every": Key(
        0, "The same as safety_every of them.", low=0, free=True, needs=("eval.harness",)
    ),
    "eval.harness_limit": Key(
        0, "Documents of each of them; 0: all.", low=0, free=True, needs=("eval.harness",)
    ),
    "safety.limit": Key(0, "Items of a safety set, evenly spaced; 0: all.", low=0, free=True),
    # --- decoding
    "decode.beam_size": Key(1, "Hypotheses of a search; 1: greedy.", low=1, high=1000, free=True),
    "decode.length_penalty": Key(
        0.6, "Scores are divided by ((5 + length) / 6)^this.", low=0.0, free=True
    ),
    "decode.min_length": Key(0, "Tokens before the end may come.", low=0, free=True),
    "decode.max_length": Key(0, "Most tokens; 0: data.target_length.", low=0, free=True),
    "decode.repetition_penalty": Key(1.0, "Above 1 repeats get less likely.", low=0.01, free=True),
    "decode.banned": Key("", "Words that are never written, comma-separated.", free=True),
    "decode.allowed": Key(
        "", "Words of which alone an output consists, comma-separated, in any case.", free=True
    ),
    "decode.banned_pattern": Key(
        "", "Regular expression (Rust's, without look-around) that no output matches.", free=True
    ),
    "decode.grammar": Key(
        "",
        "Language that an output belongs to: json:FILE (a JSON schema), lark:FILE or "
        "regex:PATTERN.",
        free=True,
    ),
    "decode.guard": Key(
        "", "Workdir of a classifier, which withholds outputs of some classes.", free=True
    ),
    "decode.guard_labels": Key(
        "", "Those classes, comma-separated.", free=True, needs=("decode.guard",)
    ),
    "decode.guard_threshold": Key(
        0.5,
        "Largest probability of these classes together that is shown.",
        low=0.0,
        high=1.0,
        free=True,
        needs=("decode.guard",),
    ),
    "decode.batch_size": Key(32, "Inputs decoded together.", low=1, free=True),
    "decode.weights": Key(
        "auto",
        "Dtype of kernels and tables; auto: model.dtype; of evaluations, no rounding.",
        choices=(*KEPT, "int4"),
        free=True,
    ),
    "decode.cache": Key("auto", "Dtype of keys and values.", choices=KEPT, free=True),
    # --- checkpoints
    "checkpoint.every_steps": Key(1000, "Save every so many steps; 0: never.", low=0, free=True),
    "checkpoint.every_seconds": Key(
        600.0, "Save when so many seconds have passed since the last; 0: never.", low=0.0, free=True
    ),
    "checkpoint.keep_last": Key(3, "Newest checkpoints kept.", low=1, free=True),
    "checkpoint.keep_every_steps": Key(
        0, "Keep every checkpoint at a multiple of this for good; 0: none.", low=0, free=True
    ),
    # --- parallelism
    "parallel.preset": Key(
        "custom",
        "Mesh by name: data or fsdp put all devices on that axis; custom: parallel.mesh.",
        choices=("custom", "data", "fsdp"),
        free=True,
    ),
    "parallel.mesh.slice": Key(
        1,
        "Slices joined by the slow network (data parallel).",
        low=-1,
        free=True,
        needs=("parallel.preset", "custom"),
    ),
    "parallel.mesh.stage": Key(
        1,
        "Pipeline stages: parts of the stack of layers.",
        low=-1,
        free=True,
        needs=("parallel.preset", "custom"),
    ),
    "parallel.mesh.data": Key(
        -1,
        "Data parallel; -1: the rest of the devices.",
        low=-1,
        free=True,
        needs=("parallel.preset", "custom"),
    ),
    "parallel.mesh.fsdp": Key(
        1,
        "Data parallel with sharded parameters.",
        low=-1,
        free=True,
        needs=("parallel.preset", "custom"),
    ),
    "parallel.mesh.expert": Key(
        1,
        "Data parallel with each expert on one of so many devices.",
        low=-1,
        free=True,
        needs=("parallel.preset", "custom"),
    ),
    "parallel.mesh.context": Key(
        1, "Parts of every sequence.", low=-1, free=True, needs=("parallel.preset", "custom")
    ),
    "parallel.mesh.tensor": Key(
        1,
        "Heads, feed-forward width, vocabulary.",
        low=-1,
        free=True,
        needs=("parallel.preset", "custom"),
    ),
    "parallel.context_attention": Key(
        "auto",
        "Attention over the parts of a sequence: keys go round in a ring, or are gathered on "
        "every device; auto: ring where the attention kernel can.",
        choices=("auto", "ring", "gather"),
        free=True,
        needs=("parallel.mesh.context",),
    ),
    "parallel.sequence": Key(
        True,
        "Between the sublayers, activations are cut along the sequence over tensor too.",
        free=True,
        needs=("parallel.mesh.tensor",),
    ),
    "parallel.pipeline.microbatches": Key(
        0,
        "Parts of a batch that follow one another through the stages; 0: as many as stages.",
        low=0,
        free=True,
        needs=("parallel.mesh.stage",),
    ),
    "parallel.pipeline.repeats": Key(
        1,
        "Times that each passes through all stages (circular schedule).",
        low=1,
        free=True,
        needs=("parallel.mesh.stage",),
    ),
    # --- logging
    "log.every_steps": Key(1, "Write every so many steps to metrics.jsonl.", low=1, free=True),
    "log.tensorboard": Key(True, "Write TensorBoard event files too.", free=True),
    "log.trackers": Key(
        "",
        "Further trackers, comma-separated: wandb, mlflow, trackio. They write into the workdir, "
        "offline, unless their own environment variables say otherwise.",
        free=True,
    ),
}
