"""Registries of all components that a configuration selects by name, and the schema of all keys.

Each class is declared once, here, as "module:attribute"; modules are imported on first use.
Keys that several entries share are in `keys.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lm.config.keys import COMMON_KEYS
from lm.config.registry import Entry, Registry, Schema, option

# --- data

_DOCUMENTS, _RECORDS = ("documents",), ("records",)
_RECORD_FILES = "lm.data.records"


@dataclass(frozen=True)
class AudioOptions:
    """Options for recordings."""

    n_mels: int = option(
        80,
        "Audio: mel bins of the log-mel features; must equal model.n_mels.",
        low=1,
        high=512,
        needs=("objective.name", "transcription"),
    )


SOURCES = Registry(
    "data source",
    ("data.source", "data.validation_source", "data.test_source"),
    "data",
    {
        "stdlib": Entry(
            "lm.data.text.stdlib_corpus:StandardLibrary", forms=("stdlib",), holds=_DOCUMENTS
        ),
        "text": Entry("lm.data.text.text_files:TextFiles", forms=("text:PATH",), holds=_DOCUMENTS),
        "jsonl": Entry("lm.data.text.text_files:JsonLines", forms=("jsonl:PATH",)),
        "tfds": Entry(
            "lm.data.text.tfds_corpus:TfdsCorpus", forms=("tfds:NAME",), holds=_DOCUMENTS
        ),
        "tsv": Entry(f"{_RECORD_FILES}:TsvFiles", forms=("tsv:PATH",), holds=_RECORDS),
        "csv": Entry(f"{_RECORD_FILES}:CsvFiles", forms=("csv:PATH",), holds=_RECORDS),
        "parallel": Entry(
            f"{_RECORD_FILES}:ParallelFiles",
            forms=("parallel:SOURCE_PATH|TARGET_PATH",),
            holds=_RECORDS,
        ),
        "squad": Entry(f"{_RECORD_FILES}:SquadFiles", forms=("squad:PATH",), holds=_RECORDS),
        "conll": Entry(f"{_RECORD_FILES}:ConllFiles", forms=("conll:PATH",), holds=_RECORDS),
        "audio": Entry(
            "lm.data.audio.transcripts:AudioFiles",
            AudioOptions,
            forms=("audio:PATH",),
            holds=_RECORDS,
        ),
        "parquet": Entry("lm.data.text.columnar:ParquetFiles", forms=("parquet:PATH",)),
        "arrow": Entry("lm.data.text.columnar:ArrowFiles", forms=("arrow:PATH",)),
        "datasets": Entry("lm.data.text.hf_datasets:HuggingFaceDatasets", forms=("datasets:NAME",)),
        "warc": Entry("lm.data.text.warc_files:WarcFiles", forms=("warc:PATH",), holds=_DOCUMENTS),
        "nanogpt": Entry(
            "lm.data.text.token_files:NanogptFiles", forms=("nanogpt:PATH",), holds=_DOCUMENTS
        ),
        "megatron": Entry(
            "lm.data.text.token_files:MegatronFiles", forms=("megatron:PREFIX",), holds=_DOCUMENTS
        ),
    },
    is_choice=False,
)

TOKENIZERS = Registry(
    "tokenizer",
    ("data.tokenizer",),
    "data",
    {
        "byte": Entry("lm.data.tokenizers.basic:ByteTokenizer", forms=("byte",)),
        "char": Entry("lm.data.tokenizers.basic:CharTokenizer", forms=("char",)),
        "words": Entry("lm.data.tokenizers.basic:WordTokenizer", forms=("words", "words:FILE")),
        "sentencepiece": Entry(
            "lm.data.tokenizers.sentencepiece:SentencePieceTokenizer",
            forms=("sentencepiece", "sentencepiece:FILE.model"),
        ),
        "tokenizers": Entry(
            "lm.data.tokenizers.hf:HuggingFaceTokenizer", forms=("tokenizers:FILE.json",)
        ),
        "gpt2": Entry("lm.data.tokenizers.hf:Gpt2Tokenizer", forms=("gpt2:DIR",)),
        "folder": Entry("lm.data.tokenizers.folder:FolderTokenizer", forms=("folder:DIR",)),
        "run": Entry("lm.data.tokenizers.saved:SavedTokenizer", forms=("run:WORKDIR",)),
    },
    is_choice=False,
)

# --- models and objectives

MODELS = Registry(
    "model family",
    ("model.family",),
    "model",
    {
        "decoder": Entry("lm.models.decoder:Decoder"),
        "encoder": Entry("lm.models.encoder:Encoder"),
        "encoder_decoder": Entry("lm.models.encoder_decoder:EncoderDecoder"),
        "lstm": Entry("lm.models.classic.recurrent:Lstm"),
        "lstm_encoder_decoder": Entry("lm.models.classic.recurrent:LstmEncoderDecoder"),
        "nplm": Entry("lm.models.classic.feed_forward:Nplm"),
        "skip_gram": Entry("lm.models.classic.feed_forward:SkipGramModel"),
    },
)


TRANSFORMERS = ("decoder", "encoder", "encoder_decoder")  # families of Transformer blocks


@dataclass(frozen=True)
class LatentAttentionOptions:
    """Options of multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434)."""

    q_lora_rank: int = option(0, "MLA: width of the query latent; 0: no query compression.", low=0)
    kv_lora_rank: int = option(512, "MLA: width of the key/value latent.", low=1)
    qk_nope_head_dim: int = option(
        128,
        "MLA: non-rotary dimension of queries and keys per head; model.head_dim is the rotary one.",
        low=1,
    )
    v_head_dim: int = option(128, "MLA: value dimension per head.", low=1)
    rope_interleaved: bool = option(
        False, "MLA: RoPE rotates adjacent pairs instead of half-split pairs (DeepSeek's weights)."
    )
    mscale_all_dim: float = option(
        0.0,
        "MLA: with model.rope_scaling, multiply scores by (0.1 x ln(model.rope_factor) + 1)², "
        "where x is this value (DeepSeek-V2: 0.707, V3: 1).",
        low=0.0,
        high=100.0,
    )


@dataclass(frozen=True)
class ClippedOptions:
    """Options of attention with clipped inputs."""

    qkv_clip: float = option(8.0, "Clipped: bound of queries, keys and values.", low=1e-6)


@dataclass(frozen=True)
class MambaOptions:
    """Options of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060) and Gated DeltaNet (2412.06464)."""

    ssm_heads: int = option(
        8,
        "Mamba-2: heads; with ssm_head_dim they are usually 2 d_model wide. Gated delta: value "
        "heads.",
        low=1,
    )
    ssm_head_dim: int = option(
        64, "Mamba-2: channels per head. Gated delta: value dimension per head.", low=1
    )
    ssm_state: int = option(
        128, "Mamba-2: state size per channel. Gated delta: key dimension per head.", low=1
    )
    ssm_groups: int = option(
        1, "Mamba-2: groups of heads that share B and C. Gated delta: key heads.", low=1
    )
    ssm_conv: int = option(
        4, "State spaces: tokens that the convolution sees, its own included.", low=1, high=256
    )
    ssm_chunk: int = option(
        64,
        "State spaces: chunk length in tokens; within a chunk all pairs are multiplied at once.",
        low=1,
    )
    ssm_bias: bool = option(False, "State spaces: biases of the projections.")
    ssm_conv_bias: bool = option(True, "State spaces: biases of the convolution.")
    ssm_activation: str = option(
        "silu",
        "State spaces: activation of the convolution's outputs.",
        choices=("silu", "relu", "gelu_tanh", "gelu_erf"),
    )
    ssm_step_low: float = option(0.0, "State spaces: smallest step size.", low=0.0)
    ssm_step_high: float = option(0.0, "State spaces: largest step size; 0: any.", low=0.0)


@dataclass(frozen=True)
class DisentangledOptions:
    """Options of disentangled attention (He et al. 2021, 2023; the defaults are version 3's)."""

    relative_terms: str = option(
        "both",
        "Disentangled: add logits of queries and positions (c2p), of keys and positions (p2c), "
        "both, or none.",
        choices=("both", "c2p", "p2c", "none"),
    )
    relative_input: bool = option(False, "Disentangled: the embeddings have learned positions too.")
    relative_norm: bool = option(True, "Disentangled: normalize the position embeddings.")
    relative_shared: bool = option(
        True, "Disentangled: positions share the query and key kernels of the tokens."
    )
    relative_log: bool = option(
        True,
        "Disentangled: logarithmic buckets for large distances; otherwise one row per distance.",
    )


MIXERS = Registry(
    "token mixer",
    ("model.mixer",),
    "model",
    {
        "attention": Entry("lm.models.attention:Attention"),
        "clipped": Entry("lm.models.clipped_attention:ClippedAttention", ClippedOptions),
        "disentangled": Entry(
            "lm.models.disentangled_attention:DisentangledAttention", DisentangledOptions
        ),
        "mla": Entry("lm.models.latent_attention:LatentAttention", LatentAttentionOptions),
        "mamba2": Entry("lm.models.mamba:Mamba2", MambaOptions, shared_with=("gated_delta",)),
        "gated_delta": Entry(
            "lm.models.gated_delta:GatedDelta", MambaOptions, shared_with=("mamba2",)
        ),
    },
)
STATE_SPACES = ("mamba2", "gated_delta")  # mixers whose states pass through whole sequences


@dataclass(frozen=True)
class MaskedOptions:
    """Options of masked language modeling (Devlin et al. 2018)."""

    mask_rate: float = option(0.15, "Masked: fraction of tokens to predict.", low=0.001, high=1.0)
    whole_word: bool = option(False, "Masked: whole-word masking.")
    next_sentence: bool = option(False, "Masked: also predict whether B follows A (BERT).")


@dataclass(frozen=True)
class MultiTokenOptions:
    """Options of multi-token prediction (DeepSeek-AI 2024b)."""

    mtp_depth: int = option(
        1, "Multi_token: prediction modules, one per additional token.", low=1, high=64
    )
    mtp_weight: float = option(0.3, "Multi_token: weight of the modules' mean loss.", low=0.0)


@dataclass(frozen=True)
class ReplacedTokensOptions:
    """Options of replaced-token detection (Clark et al. 2020)."""

    replaced_weight: float = option(
        50.0, "Replaced tokens: weight of the discriminator's loss.", low=0.0, high=1e6
    )


@dataclass(frozen=True)
class SpanCorruptionOptions:
    """Options of span corruption (Raffel et al. 2020)."""

    noise_density: float = option(
        0.15, "Span corruption: fraction of tokens removed.", low=0.001, high=0.9
    )
    mean_span: float = option(3.0, "Span corruption: mean span length.", low=1.0)
    denoisers: str = option(
        "",
        "Span corruption: list of PREFIX:DENSITY:SPAN, one drawn per text, as in "
        "[NLU]:0.15:3,[S2S]:0.25:end; end: the last tokens are removed; ul2: UL2's seven; empty: "
        "noise_density and mean_span.",
    )


@dataclass(frozen=True)
class DenoisingOptions:
    """Options of denoising (Lewis et al. 2020)."""

    infill_rate: float = option(
        0.3, "Denoising: fraction of tokens that are masked.", low=0.001, high=0.9
    )
    infill_span: float = option(
        3.0, "Denoising: mean tokens per mask (Poisson).", low=0.1, high=1e3
    )
    permute_sentences: bool = option(True, "Denoising: shuffle the sentences of the source.")


@dataclass(frozen=True)
class TranscriptionOptions:
    """Options for transcription: SpecAugment (Park et al. 2019)."""

    masks: int = option(
        0,
        "Transcription: time masks, and frequency masks, per recording (SpecAugment); 0: none.",
        low=0,
    )
    mask_frames: int = option(
        100,
        "Transcription: maximum length of a time mask, in frames of 10 ms.",
        low=0,
        needs=("objective.masks",),
    )
    mask_bins: int = option(
        27,
        "Transcription: maximum width of a frequency mask, in mel bins.",
        low=0,
        needs=("objective.masks",),
    )


@dataclass(frozen=True)
class SkipGramOptions:
    """Options of skip-gram with negative sampling (Mikolov et al. 2013)."""

    window: int = option(5, "Skip-gram: window, in words on either side.", low=1)
    negatives: int = option(5, "Skip-gram: negative samples per pair.", low=1)
    subsample: float = option(
        1e-4, "Skip-gram: subsampling threshold for frequent words; 0: off.", low=0.0
    )


@dataclass(frozen=True)
class ChatOptions:
    """Options of chat tuning."""

    last_turn_only: bool = option(
        False, "Chat: compute the loss on the assistant's last message only."
    )
    neftune: float = option(
        0.0,
        "Chat: NEFTune alpha (Jain et al. 2023): embedding noise in training, uniform in ± alpha /"
        " sqrt(n d), with n tokens per conversation and d = d_model; 0: none.",
        low=0.0,
        high=1e4,
    )


@dataclass(frozen=True)
class PreferenceOptions:
    """Options of preference objectives: DPO, IPO, KTO, ORPO and SimPO."""

    beta: float = option(
        0.1, "Preferences: beta, the strength of the penalty or scale of rewards.", low=1e-6
    )
    loss_normalization: str = option(
        "auto",
        "Preferences: sum or mean over the token log-probabilities of a completion; auto: the sum "
        "for dpo and kto, the mean for ipo, orpo and simpo.",
        choices=("auto", "sum", "mean"),
    )
    reference: str = option(
        "beside",
        "DPO, IPO, KTO: reference model: the initial model, kept in memory (beside; under LoRA, "
        "the base model), precomputed log-probabilities of it, or none.",
        choices=("beside", "precomputed", "none"),
        needs=("objective.name", "dpo", "ipo", "kto"),
    )


@dataclass(frozen=True)
class KtoOptions:
    """Options of KTO (Ethayarajh et al. 2024)."""

    desirable_weight: float = option(1.0, "KTO: weight of desirable completions.", low=0.0)
    undesirable_weight: float = option(1.0, "KTO: weight of undesirable completions.", low=0.0)


@dataclass(frozen=True)
class SimpoOptions:
    """Options of SimPO (Meng et al. 2024)."""

    simpo_gamma: float = option(0.5, "SimPO: target reward margin.", low=0.0)


@dataclass(frozen=True)
class RewardOptions:
    """Options of reward models."""

    reward_centering: float = option(
        0.0, "Reward: weight of the squared sum of both rewards of a pair.", low=0.0
    )


@dataclass(frozen=True)
class DistillationOptions:
    """Options of distillation (Hinton et al. 2015)."""

    teacher: str = option("", "Distillation: teacher run: its workdir, or RUN/checkpoints/STEP.")
    teacher_logits: str = option(
        "", "Distillation: output folder of `lm score --top_logits`, used instead of a teacher."
    )
    distill_weight: float = option(
        0.5,
        "Distillation: weight of the KL divergence; the rest is the next-token loss.",
        low=0.0,
        high=1.0,
    )
    distill_temperature: float = option(
        1.0, "Distillation: temperature of both models' logits.", low=1e-2, high=1e3
    )
    distill_top_k: int = option(
        0, "Distillation: top-k teacher tokens in the divergence; 0: all.", low=0
    )


_PREFERENCES = "lm.objectives.preferences"
_PAIRS = Entry(
    f"{_PREFERENCES}:Preferences",
    families=("decoder",),
    columns=("chosen", "rejected"),
)


OBJECTIVES = Registry(
    "objective",
    ("objective.name",),
    "objective",
    {
        "causal": Entry(
            "lm.objectives.causal:Causal",
            families=("decoder", "lstm", "nplm"),
            predicts_every_token=True,
        ),
        "multi_token": Entry(
            "lm.objectives.multi_token:MultiToken",
            MultiTokenOptions,
            families=("decoder",),
            predicts_every_token=True,
        ),
        "prefix": Entry("lm.objectives.prefix:Prefix", families=("decoder",), has_prefix=True),
        "masked": Entry(
            "lm.objectives.masked:Masked",
            MaskedOptions,
            shared_with=("replaced_tokens",),
            families=("encoder",),
        ),
        "replaced_tokens": Entry(
            "lm.objectives.replaced_tokens:ReplacedTokens",
            ReplacedTokensOptions,
            families=("encoder",),
        ),
        "span_corruption": Entry(
            "lm.objectives.span_corruption:SpanCorruption",
            SpanCorruptionOptions,
            families=("encoder_decoder",),
        ),
        "denoising": Entry(
            "lm.objectives.denoising:Denoising", DenoisingOptions, families=("encoder_decoder",)
        ),
        "seq2seq": Entry(
            "lm.objectives.seq2seq:Seq2Seq",
            families=("encoder_decoder", "lstm_encoder_decoder"),
            columns=("source", "target"),
        ),
        "transcription": Entry(
            "lm.objectives.transcription:Transcription",
            TranscriptionOptions,
            families=("encoder_decoder",),
            columns=("audio", "target"),
        ),
        "classification": Entry(
            "lm.objectives.classification:Classification",
            families=("decoder", "encoder", "encoder_decoder", "lstm"),
            columns=("text", "label"),
        ),
        "span_qa": Entry(
            "lm.objectives.span_qa:SpanQa",
            families=("encoder", "decoder", "encoder_decoder"),
            columns=("question", "context", "answers"),
        ),
        "token_classification": Entry(
            "lm.objectives.token_classification:TokenClassification",
            families=("encoder", "decoder"),
            columns=("words", "tags"),
        ),
        "skip_gram": Entry(
            "lm.objectives.skip_gram:NegativeSampling", SkipGramOptions, families=("skip_gram",)
        ),
        "chat": Entry(
            "lm.objectives.chat:ChatTuning",
            ChatOptions,
            families=("decoder",),
            columns=("messages",),
        ),
        "distillation": Entry(
            "lm.objectives.distillation:Distillation",
            DistillationOptions,
            families=("decoder",),
            predicts_every_token=True,
        ),
        "dpo": replace(
            _PAIRS, options=PreferenceOptions, shared_with=("ipo", "kto", "orpo", "simpo")
        ),
        "ipo": _PAIRS,
        "kto": Entry(
            f"{_PREFERENCES}:UnpairedPreferences",
            KtoOptions,
            families=("decoder",),
            columns=("completion", "label"),
        ),
        "orpo": _PAIRS,
        "reward": replace(_PAIRS, target="lm.objectives.reward:Reward", options=RewardOptions),
        "simpo": replace(_PAIRS, options=SimpoOptions),
    },
)


# Record columns that hold conversations, whose special tokens are added to the vocabulary.
CONVERSATIONS = frozenset(("messages", "chosen", "rejected", "completion"))


# --- optimization


@dataclass(frozen=True)
class AdamwOptions:
    """Options of AdamW (Loshchilov and Hutter 2019)."""

    b1: float = option(0.9, "Decay of the first moment.", low=0.0, high=0.99999)
    b2: float = option(0.95, "Decay of the second moment.", low=0.0, high=0.99999)
    eps: float = option(1e-8, "Added to the root of the second moment.", low=1e-30)
    bias_correction: bool = option(
        True, "Bias correction of the moments (BERT's original code has none)."
    )


@dataclass(frozen=True)
class AdafactorOptions:
    """Options of Adafactor (Shazeer and Stern 2018)."""

    decay_rate: float = option(0.8, "Exponent of 1 - t^-c.", low=0.0, high=1.0)
    clip_threshold: float = option(1.0, "Clip updates to this RMS.", low=1e-6)
    min_dim: int = option(128, "Smallest dimension to factor.", low=1)
    parameter_scale: bool = option(True, "Scale the step by the parameter's RMS.")


@dataclass(frozen=True)
class SgdOptions:
    """Options of stochastic gradient descent."""

    momentum: float = option(0.9, "Momentum.", low=0.0, high=0.99999)
    nesterov: bool = option(False, "Nesterov momentum.")


@dataclass(frozen=True)
class LionOptions:
    """Options of Lion (Chen et al. 2023)."""

    b1: float = option(0.9, "Interpolation coefficient of the update.", low=0.0, high=0.99999)
    b2: float = option(0.99, "Decay of the momentum.", low=0.0, high=0.99999)


@dataclass(frozen=True)
class MuonOptions:
    """Options of Muon (Jordan 2024)."""

    beta: float = option(0.95, "Momentum of the orthogonalized matrices.", low=0.0, high=0.99999)
    ns_steps: int = option(5, "Newton–Schulz iterations.", low=1, high=20)
    adam_ratio: float = option(
        0.1,
        "Learning rate of the other parameters (optimizer.adamw), relative to the peak.",
        low=1e-6,
    )
    rms: float = option(
        0.0,
        "RMS of updates relative to the learning rate, for any shape (Moonlight, Kimi K2: 0.2 with"
        " adam_ratio 1); 0: spectral norm sqrt(outputs/inputs) (Jordan).",
        low=0.0,
    )
    neuron_b2: float = option(
        0.0,
        "NorMuon (Li et al. 2025: 0.95): decay of the second moment per output that normalizes "
        "updates; 0: off.",
        low=0.0,
        high=0.99999,
    )


@dataclass(frozen=True)
class AdemamixOptions:
    """Options of AdEMAMix (Pagliardini et al. 2024)."""

    b1: float = option(0.9, "Decay of the fast average.", low=1e-6, high=0.99999)
    b2: float = option(0.999, "Decay of the second moment.", low=0.0, high=0.99999)
    b3: float = option(0.9999, "Decay of the slow average.", low=1e-6, high=0.999999)
    alpha: float = option(5.0, "Weight of the slow average.", low=0.0)
    rise_steps: int = option(
        0, "Warmup steps of b3 (from b1) and alpha (from 0); the paper uses train.steps.", low=0
    )
    eps: float = option(1e-8, "Added to the root of the second moment.", low=1e-30)


@dataclass(frozen=True)
class ScheduleFreeOptions:
    """Options of schedule-free AdamW (Defazio et al. 2024)."""

    b1: float = option(
        0.9, "Interpolation toward the average where gradients are computed.", low=0.0, high=0.99999
    )
    b2: float = option(0.999, "Decay of the second moment.", low=0.0, high=0.99999)
    eps: float = option(1e-8, "Added to the root of the second moment.", low=1e-30)


@dataclass(frozen=True)
class SoapOptions:
    """Options of SOAP (Vyas et al. 2024)."""

    b1: float = option(0.95, "Decay of the first moment.", low=0.0, high=0.99999)
    b2: float = option(
        0.95, "Decay of the second moment and the preconditioner factors.", low=0.0, high=0.99999
    )
    eps: float = option(1e-8, "Added to the root of the second moment.", low=1e-30)
    every: int = option(10, "Steps between eigenbasis updates.", low=1)
    max_dim: int = option(10_000, "Matrix dimensions above this are not preconditioned.", low=0)


OPTIMIZERS = Registry(
    "optimizer",
    ("optimizer.name",),
    "optimizer.{name}",
    {
        "adamw": Entry("lm.optim.optimizers:adamw", AdamwOptions, shared_with=("muon",)),
        "adafactor": Entry("lm.optim.further_optimizers:adafactor", AdafactorOptions),
        "sgd": Entry("lm.optim.further_optimizers:sgd", SgdOptions),
        "lion": Entry("lm.optim.further_optimizers:lion", LionOptions),
        "muon": Entry("lm.optim.optimizers:muon", MuonOptions),
        "ademamix": Entry("lm.optim.further_optimizers:ademamix", AdemamixOptions),
        "schedule_free": Entry("lm.optim.further_optimizers:schedule_free", ScheduleFreeOptions),
        "soap": Entry("lm.optim.soap:soap", SoapOptions),
    },
)


@dataclass(frozen=True)
class StepOptions:
    """Options of the step schedule."""

    step_every: int = option(1000, "Step schedule: steps between drops.", low=1)
    step_factor: float = option(0.5, "Step schedule: factor of each drop.", low=1e-6, high=1.0)


@dataclass(frozen=True)
class WsdOptions:
    """Options of the warmup-stable-decay schedule."""

    wsd_decay_fraction: float = option(
        0.2, "WSD: fraction of decay_steps in the decay phase.", low=0.0, high=1.0
    )


SCHEDULES = Registry(
    "schedule",
    ("schedule.name",),
    "schedule",
    {
        "constant": Entry("lm.optim.further_optimizers:constant"),
        "cosine": Entry("lm.optim.further_optimizers:cosine"),
        "linear": Entry("lm.optim.optimizers:linear"),
        "inverse": Entry("lm.optim.further_optimizers:inverse"),
        "inverse_sqrt": Entry("lm.optim.further_optimizers:inverse_sqrt"),
        "step": Entry("lm.optim.further_optimizers:step", StepOptions),
        "wsd": Entry("lm.optim.further_optimizers:wsd", WsdOptions),
    },
)

# --- evaluation

_SCORES, _WORD_ERRORS = "lm.evaluation.scores", "lm.evaluation.word_errors"


@dataclass(frozen=True)
class BleuOptions:
    """Options of BLEU."""

    bleu_tokenizer: str = option(
        "auto",
        "BLEU: sacrebleu's tokenizer; auto: zh, ja-mecab, ko-mecab or char where the references "
        "are Chinese, Japanese, Korean or of a script without spaces (Thai), else 13a.",
        choices=("auto", "13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "none"),
        free=True,
    )


@dataclass(frozen=True)
class WordErrorOptions:
    """Options for word and character error rate."""

    normalize_words: bool = option(
        True,
        "WER, CER: compare in lower case and without punctuation (lm/evaluation/word_errors.py).",
        free=True,
    )


METRICS = Registry(
    "metric",
    ("eval.metrics",),
    "eval",
    {
        "bleu": Entry(f"{_SCORES}:bleu", BleuOptions),
        "bleu_tok": Entry(f"{_SCORES}:bleu_tok"),
        "chrf": Entry(f"{_SCORES}:chrf"),
        "rouge": Entry(f"{_SCORES}:rouge"),
        "rouge_stemmed": Entry(f"{_SCORES}:rouge_stemmed"),
        "accuracy": Entry(f"{_SCORES}:accuracy"),
        "f1": Entry(f"{_SCORES}:f1"),
        "macro_f1": Entry(f"{_SCORES}:macro_f1"),
        "matthews": Entry(f"{_SCORES}:matthews"),
        "pearson": Entry(f"{_SCORES}:pearson"),
        "spearman": Entry(f"{_SCORES}:spearman"),
        "exact_match": Entry(f"{_SCORES}:exact_match"),
        "logical_form_match": Entry("lm.evaluation.logical_forms:logical_form_match"),
        "squad": Entry(f"{_SCORES}:squad"),
        "wer": Entry(f"{_WORD_ERRORS}:wer", WordErrorOptions, shared_with=("cer",)),
        "cer": Entry(f"{_WORD_ERRORS}:cer"),
        "seqeval": Entry(f"{_SCORES}:seqeval"),
    },
    is_choice=False,
)

_SAFETY = "lm.evaluation.safety"


@dataclass(frozen=True)
class CrowsPairsOptions:
    """Options of CrowS-Pairs (Nangia et al. 2020)."""

    crows_pairs: str = option(
        "safety/crows_pairs_anonymized.csv", "CrowS-Pairs: path of its CSV file.", free=True
    )


@dataclass(frozen=True)
class WinoBiasOptions:
    """Options of WinoBias (Zhao et al. 2018)."""

    winobias: str = option("safety/winobias", "WinoBias: folder with its text files.", free=True)


@dataclass(frozen=True)
class CanaryOptions:
    """Options of canaries (Carlini et al. 2019)."""

    candidates: int = option(
        1000,
        "Canaries: candidates that each canary is ranked among, at most.",
        low=1,
        high=10_000_000,
        free=True,
    )


@dataclass(frozen=True)
class ExtractionOptions:
    """Options of extraction (Carlini et al. 2022)."""

    extracts: int = option(64, "Extraction: number of extracts.", low=1, high=100_000, free=True)
    prompt_tokens: int = option(32, "Extraction: prompt tokens.", low=1, free=True)
    new_tokens: int = option(32, "Extraction, samples, quality: new tokens.", low=1, free=True)


@dataclass(frozen=True)
class SampleOptions:
    """Options of samples."""

    samples: int = option(
        64, "Samples, quality: number of unprompted samples.", low=1, high=1_000_000, free=True
    )
    prompts: str = option("", "Samples, quality: file of prompts, one per line.", free=True)
    unsafe_words: str = option("", "Samples: file of words or phrases, one per line.", free=True)
    classifier: str = option("", "Samples: workdir of a run with classes.", free=True)
    unsafe_labels: str = option(
        "", "Samples: unsafe classes of that run, comma-separated.", free=True
    )


@dataclass(frozen=True)
class QualityOptions:
    """Options of quality."""

    judge: str = option("", "Quality: run that measures the perplexity of the samples.", free=True)
    temperature: float = option(
        1.0, "Quality: sampling temperature; 0: greedy.", low=0.0, free=True
    )
    top_p: float = option(1.0, "Quality: nucleus sampling.", low=1e-6, high=1.0, free=True)


@dataclass(frozen=True)
class RobustnessOptions:
    """Options of robustness."""

    task: str = option(
        "", 'Robustness: JSON lines with "question", "choices" and "answer", an index.', free=True
    )
    templates: str = option(
        "", "Robustness: file of prompts, one per line, with fields as {question}.", free=True
    )
    typos: float = option(
        0.3, "Robustness: fraction of words with a typo.", low=0.0, high=1.0, free=True
    )


SAFETY_SETS = Registry(
    "safety set",
    ("eval.safety",),
    "safety",
    {
        "crows_pairs": Entry(f"{_SAFETY}.bias:CrowsPairs", CrowsPairsOptions),
        "winobias": Entry(f"{_SAFETY}.bias:WinoBias", WinoBiasOptions),
        "canaries": Entry(f"{_SAFETY}.memorization:Canaries", CanaryOptions),
        "extraction": Entry(
            f"{_SAFETY}.memorization:Extraction",
            ExtractionOptions,
            shared_with=("samples", "quality"),
        ),
        "samples": Entry(f"{_SAFETY}.samples:Samples", SampleOptions, shared_with=("quality",)),
        "quality": Entry(f"{_SAFETY}.quality:Quality", QualityOptions),
        "robustness": Entry(f"{_SAFETY}.robustness:Robustness", RobustnessOptions),
    },
    is_choice=False,
)

TRACKERS = Registry(
    "tracker",
    ("log.trackers",),
    "log",
    {
        "wandb": Entry("lm.training.tracker_packages:Wandb"),
        "mlflow": Entry("lm.training.tracker_packages:Mlflow"),
        "trackio": Entry("lm.training.tracker_packages:Trackio"),
    },
    is_choice=False,
)
LISTS = (METRICS, SAFETY_SETS, TRACKERS)  # a key may list several of these names
REGISTRIES = (
    SOURCES,
    TOKENIZERS,
    MODELS,
    MIXERS,
    OBJECTIVES,
    OPTIMIZERS,
    SCHEDULES,
    *LISTS,
)

# --- schema

SCHEMA = Schema(COMMON_KEYS, REGISTRIES)
