"""Every configuration key: its default, meaning and range. `lm config --keys` prints this table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Key:
    """One configuration key.

    `low` and `high` are inclusive. A `free` key may differ between two starts of the same run:
    it changes how the run is executed, not what it learns.
    """

    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    free: bool = False

    @property
    def type(self) -> type:
        return type(self.default)


SCHEMA: dict[str, Key] = {
    "seed": Key(0, "Seed of initialisation, dropout and data order.", low=0, high=2**31 - 1),
    "paper": Key("", "Name of the published model that this configuration reproduces."),
    # --- model
    "model.family": Key("decoder", "Kind of model.", choices=("decoder",)),
    "model.n_layers": Key(4, "Transformer blocks.", low=1),
    "model.d_model": Key(128, "Width of the residual stream.", low=1),
    "model.n_heads": Key(4, "Query heads.", low=1),
    "model.n_kv_heads": Key(0, "Key/value heads (grouped-query); 0: as many as n_heads.", low=0),
    "model.head_dim": Key(0, "Dimension of a head; 0: d_model / n_heads.", low=0),
    "model.d_ff": Key(0, "Width of the feed-forward layer; 0: 4 d_model.", low=0),
    "model.vocab_size": Key(0, "Rows of the token table; 0: the tokenizer's size.", low=0),
    "model.max_length": Key(0, "Longest context; 0: data.sequence_length.", low=0),
    "model.norm": Key("layernorm", "Normalisation.", choices=("layernorm", "rmsnorm")),
    "model.norm_eps": Key(1e-5, "Epsilon inside the normalisation.", low=0.0, high=1.0),
    "model.norm_placement": Key(
        "pre", "Normalise before each sublayer or after the sum.", choices=("pre", "post")
    ),
    "model.norm_bias": Key(True, "LayerNorm has a bias."),
    "model.bias": Key(True, "Linear layers have biases."),
    "model.positions": Key(
        "learned",
        "Position information.",
        choices=("learned", "sinusoidal", "rotary", "none"),
    ),
    "model.rope_theta": Key(10_000.0, "Base of the rotary wavelengths.", low=1.0),
    "model.activation": Key(
        "gelu_tanh",
        "Non-linearity; the glu ones are gated (two input projections).",
        choices=("relu", "gelu_tanh", "gelu_erf", "swiglu", "geglu"),
    ),
    "model.tie_embeddings": Key(True, "The output projection is the token table."),
    "model.dropout": Key(0.0, "Dropout of embeddings and sublayer outputs.", low=0.0, high=0.99),
    "model.attention_dropout": Key(0.0, "Dropout of attention weights.", low=0.0, high=0.99),
    "model.init_std": Key(0.02, "Deviation of the normal initialisation.", low=0.0, high=10.0),
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
        "Attention kernel: plain XLA, or tiles that skip the masked half (for CPUs).",
        choices=("auto", "xla", "tiled"),
        free=True,
    ),
    # --- objective
    "objective.name": Key("causal", "What is learnt.", choices=("causal",)),
    # --- data
    "data.source": Key(
        "stdlib", "Corpora, comma-separated: stdlib, text:FILE, jsonl:FILE, tfds:NAME."
    ),
    "data.weights": Key((), "Mixture weights of the corpora; (): by tokens."),
    "data.directory": Key(
        "", "Where relative paths start; empty: $LM_DATA_DIR, else the current folder.", free=True
    ),
    "data.field": Key("text", "Field of a jsonl or TFDS record that holds the text."),
    "data.documents": Key("file", "A text file's document.", choices=("file", "line")),
    "data.split": Key("train", "TFDS split to train on."),
    "data.validation_split": Key("validation", "TFDS split to validate on."),
    "data.validation_source": Key("", "Corpora for validation, written as data.source."),
    "data.validation_fraction": Key(
        0.0, "Last part held out where there is no validation source.", low=0.0, high=0.9
    ),
    "data.tokenizer": Key(
        "byte",
        "byte, char, sentencepiece (trained on the corpus), sentencepiece:FILE, "
        "tokenizers:FILE.json, gpt2:FOLDER.",
    ),
    "data.tokenizer_vocab_size": Key(
        4096, "Pieces of a SentencePiece model trained on the corpus.", low=2
    ),
    "data.sequence_length": Key(256, "Tokens of an example.", low=1),
    "data.stride": Key(
        0, "Training examples start every so many tokens; 0: sequence_length.", low=0
    ),
    "data.isolate_documents": Key(True, "Attention and positions stay within a document."),
    "data.batch_size": Key(8, "Sequences of a step, over all devices.", low=1),
    "data.cache_directory": Key(
        "", "Token stores; empty: $LM_CACHE_DIR, else ~/.cache/lm.", free=True
    ),
    "data.workers": Key(0, "Processes that tokenise; 0: one a core.", low=0, high=1024, free=True),
    "data.prefetch": Key(2, "Batches prepared ahead.", low=1, high=1024, free=True),
    # --- training
    "train.steps": Key(1000, "Optimizer updates.", low=1),
    "train.microbatches": Key(1, "Parts of a batch whose gradients are summed.", low=1),
    "train.remat": Key(
        "none",
        "What the backward pass recomputes: nothing, all but matmul results, or everything.",
        choices=("none", "dots", "full"),
        free=True,
    ),
    "train.scan_unroll": Key(
        1, "Layers inlined in one turn of the scan over layers; 0: all.", low=0, free=True
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
    # --- optimizer
    "optimizer.name": Key(
        "adamw", "Update rule.", choices=("adamw", "adafactor", "sgd", "lion", "muon")
    ),
    "optimizer.learning_rate": Key(1e-3, "Peak learning rate.", low=0.0, high=1e6),
    "optimizer.weight_decay": Key(0.1, "Decoupled weight decay, times the learning rate.", low=0.0),
    "optimizer.decay": Key(
        "matrices",
        "What decays: kernels and embeddings, kernels only, or every parameter.",
        choices=("matrices", "kernels", "all"),
    ),
    "optimizer.clip_norm": Key(1.0, "Largest global gradient norm; 0: no clipping.", low=0.0),
    "optimizer.adamw.b1": Key(0.9, "Decay of the first moment.", low=0.0, high=0.99999),
    "optimizer.adamw.b2": Key(0.95, "Decay of the second moment.", low=0.0, high=0.99999),
    "optimizer.adamw.eps": Key(1e-8, "Added to the root of the second moment.", low=0.0),
    "optimizer.adafactor.decay_rate": Key(0.8, "Exponent of 1 - t^-c.", low=0.0, high=1.0),
    "optimizer.adafactor.clip_threshold": Key(1.0, "Largest RMS of an update.", low=1e-6),
    "optimizer.adafactor.min_dim": Key(128, "Smallest dimension that is factored.", low=1),
    "optimizer.adafactor.parameter_scale": Key(
        True, "Multiply the step by the parameter's root mean square."
    ),
    "optimizer.sgd.momentum": Key(0.9, "Momentum.", low=0.0, high=0.99999),
    "optimizer.sgd.nesterov": Key(False, "Nesterov's form."),
    "optimizer.lion.b1": Key(0.9, "Interpolation of the update.", low=0.0, high=0.99999),
    "optimizer.lion.b2": Key(0.99, "Decay of the momentum.", low=0.0, high=0.99999),
    "optimizer.muon.beta": Key(
        0.95, "Momentum of the orthogonalised matrices.", low=0.0, high=0.99999
    ),
    "optimizer.muon.ns_steps": Key(5, "Newton–Schulz iterations.", low=1, high=20),
    "optimizer.muon.adam_ratio": Key(
        0.1,
        "Learning rate of the other parameters (optimizer.adamw), relative to the peak.",
        low=0.0,
    ),
    # --- schedule
    "schedule.name": Key(
        "cosine",
        "Learning rate after the warm-up.",
        choices=("constant", "cosine", "linear", "inverse_sqrt", "wsd"),
    ),
    "schedule.warmup_steps": Key(0, "Steps of linear warm-up.", low=0),
    "schedule.decay_steps": Key(
        0, "Step at which cosine, linear and wsd end their decay; 0: train.steps.", low=0
    ),
    "schedule.final_ratio": Key(0.1, "Last learning rate over the peak.", low=0.0, high=1.0),
    "schedule.wsd_decay_fraction": Key(
        0.2, "Part of decay_steps in which wsd goes down.", low=0.0, high=1.0
    ),
    # --- evaluation
    "eval.every_steps": Key(0, "Validate every so many steps; 0: only at the end.", low=0),
    "eval.batch_size": Key(0, "Sequences of a validation batch; 0: data.batch_size.", low=0),
    "eval.max_batches": Key(0, "Validation batches during training; 0: the whole split.", low=0),
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
        1, "Slices joined by the slow network (data parallel).", low=-1, free=True
    ),
    "parallel.mesh.stage": Key(1, "Pipeline stages (only 1 so far).", low=1, high=1, free=True),
    "parallel.mesh.data": Key(-1, "Data parallel; -1: the rest of the devices.", low=-1, free=True),
    "parallel.mesh.fsdp": Key(1, "Data parallel with sharded parameters.", low=-1, free=True),
    "parallel.mesh.expert": Key(1, "Experts (only 1 so far).", low=1, high=1, free=True),
    "parallel.mesh.context": Key(1, "Sequence parts (only 1 so far).", low=1, high=1, free=True),
    "parallel.mesh.tensor": Key(1, "Heads, feed-forward width, vocabulary.", low=-1, free=True),
    # --- logging
    "log.every_steps": Key(1, "Write every so many steps to metrics.jsonl.", low=1, free=True),
    "log.tensorboard": Key(True, "Write TensorBoard event files too.", free=True),
}
