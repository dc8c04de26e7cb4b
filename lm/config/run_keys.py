"""Keys of the data, of what is learned from it and of how a run proceeds.

The options of single objectives, optimizers and schedules are declared in `registries.py`, the
keys of the model in `model_keys.py`.
"""

from __future__ import annotations

from lm.config.registry import Key

RUN_KEYS: dict[str, Key] = {
    # --- data
    "data.source": Key(
        "stdlib",
        "Corpora, comma-separated: stdlib, text:FILE, jsonl:FILE, tfds:NAME. For seq2seq, "
        "classification and span_qa one of tsv:FILE, csv:FILE, jsonl:FILE, parallel:FILE|FILE, "
        "squad:FILE.",
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
    "data.test_source": Key("", "Corpora for `lm eval --split test`.", free=True),
    "data.columns": Key(
        "", "Columns of records by role, such as text=sentence,label=label; numbers count from 0."
    ),
    "data.header": Key(True, "TSV and CSV files start with the names of their columns."),
    "data.bad_rows": Key("error", "A bad row is an error, or skipped.", choices=("error", "skip")),
    "data.labels": Key("", "Names of the classes, comma-separated; empty: a number is learnt."),
    "data.target_length": Key(0, "Tokens of a target sequence; 0: data.sequence_length.", low=0),
    "data.doc_stride": Key(128, "Tokens from one window of a long context to the next.", low=1),
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
        "sentencepiece:FILE, tokenizers:FILE.json, gpt2:FOLDER, run:WORKDIR (that of a run).",
    ),
    "data.tokenizer_vocab_size": Key(
        4096, "Pieces of a SentencePiece model trained on the corpus; most words of words.", low=2
    ),
    "data.tokenizer_min_count": Key(1, "Rarer words are unknown to the words tokenizer.", low=1),
    "data.lowercase": Key(False, "The words tokenizer lower-cases."),
    "data.sequence_length": Key(256, "Tokens of an example.", low=1),
    "data.stride": Key(
        0, "Training windows start every so many tokens; 0: where the last one ended.", low=0
    ),
    "data.isolate_documents": Key(True, "Attention and positions stay within a document."),
    "data.batch_size": Key(8, "Sequences of a step, over all devices.", low=1),
    "data.cache_directory": Key(
        "", "Token stores; empty: $LM_CACHE_DIR, else ~/.cache/lm.", free=True
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
    "init.average": Key(1, "Average its last so many checkpoints.", low=1),
    "init.fresh": Key("", "Patterns of parameters that stay fresh, comma-separated."),
    "init.leave": Key("", "Patterns of its parameters that are not used, comma-separated."),
    "init.rename": Key("", "Its parameters' new names: PATTERN=>NAME, comma-separated."),
    "init.vectors": Key("", "GloVe file for the token table of the words tokenizer."),
    # --- low-rank adaptation
    "lora.rank": Key(0, "Rank of the trained updates (Hu et al. 2021); 0: off.", low=0),
    "lora.alpha": Key(16.0, "Updates are scaled by alpha / rank.", low=0.0),
    "lora.targets": Key("attention/(query|value)/kernel", "Pattern of the adapted kernels."),
    "lora.train": Key("", "Patterns of other parameters that train too, comma-separated."),
    # --- optimizer
    "optimizer.freeze": Key(
        "",
        "Patterns of parameters that do not train, comma-separated; a single layer is matched by "
        "layers/3/.",
    ),
    "optimizer.layer_decay": Key(
        1.0, "Learning rate of a layer over that of the next one up.", low=0.0, high=1.0
    ),
    "optimizer.name": Key("adamw", "Update rule."),
    "optimizer.learning_rate": Key(1e-3, "Peak learning rate.", low=0.0, high=1e6),
    "optimizer.weight_decay": Key(0.1, "Decoupled weight decay, times the learning rate.", low=0.0),
    "optimizer.decay": Key(
        "matrices",
        "What decays: kernels and embeddings, kernels only, or every parameter.",
        choices=("matrices", "kernels", "all"),
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
    ),
    "schedule.final_ratio": Key(0.1, "Last learning rate over the peak.", low=0.0, high=1.0),
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
        0, "Columns of a batch whose logits exist at once; 0: all.", low=0, free=True
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
        "Stop with a saved state and exit code 75 after this step, long before train.steps "
        "perhaps; 0: never.",
        low=0,
        free=True,
    ),
    "train.stall_seconds": Key(
        1800.0,
        "A run in which nothing happens for so long ends with an error; 0: never.",
        low=0.0,
        free=True,
    ),
    # --- evaluation
    "eval.every_steps": Key(0, "Validate every so many steps; 0: only at the end.", low=0),
    "eval.batch_size": Key(0, "Sequences of a validation batch; 0: data.batch_size.", low=0),
    "eval.max_batches": Key(0, "Validation batches during training; 0: the whole split.", low=0),
    "eval.final_batches": Key(0, "The same after the last step.", low=0),
    "eval.metrics": Key(
        "", "Metrics of `lm eval --task`, comma-separated; empty: the usual of the objective."
    ),
    "eval.best": Key(
        "", "Keep the best checkpoint by this validation figure too, such as accuracy or -loss."
    ),
    # --- decoding
    "decode.beam_size": Key(1, "Hypotheses of a search; 1: greedy.", low=1, high=1000, free=True),
    "decode.length_penalty": Key(
        0.6, "Scores are divided by ((5 + length) / 6)^this.", low=0.0, free=True
    ),
    "decode.min_length": Key(0, "Tokens before the end may come.", low=0, free=True),
    "decode.max_length": Key(0, "Most tokens; 0: data.target_length.", low=0, free=True),
    "decode.repetition_penalty": Key(1.0, "Above 1 repeats get less likely.", low=0.01, free=True),
    "decode.banned": Key("", "Words that are never written, comma-separated.", free=True),
    "decode.batch_size": Key(32, "Inputs decoded together.", low=1, free=True),
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
    "parallel.mesh.stage": Key(
        1, "Pipeline stages: parts of the stack of layers.", low=-1, free=True
    ),
    "parallel.mesh.data": Key(-1, "Data parallel; -1: the rest of the devices.", low=-1, free=True),
    "parallel.mesh.fsdp": Key(1, "Data parallel with sharded parameters.", low=-1, free=True),
    "parallel.mesh.expert": Key(
        1, "Data parallel with each expert on one of so many devices.", low=-1, free=True
    ),
    "parallel.mesh.context": Key(1, "Parts of every sequence.", low=-1, free=True),
    "parallel.mesh.tensor": Key(1, "Heads, feed-forward width, vocabulary.", low=-1, free=True),
    "parallel.context_attention": Key(
        "auto",
        "Attention over the parts of a sequence: keys go round in a ring, or are gathered on "
        "every device; auto: ring where the attention kernel can.",
        choices=("auto", "ring", "gather"),
        free=True,
    ),
    "parallel.sequence": Key(
        False,
        "Between the sublayers, activations are cut along the sequence over tensor too.",
        free=True,
    ),
    "parallel.pipeline.microbatches": Key(
        0,
        "Parts of a batch that follow one another through the stages; 0: as many as stages.",
        low=0,
        free=True,
    ),
    "parallel.pipeline.repeats": Key(
        1, "Times that each passes through all stages (circular schedule).", low=1, free=True
    ),
    # --- logging
    "log.every_steps": Key(1, "Write every so many steps to metrics.jsonl.", low=1, free=True),
    "log.tensorboard": Key(True, "Write TensorBoard event files too.", free=True),
}
