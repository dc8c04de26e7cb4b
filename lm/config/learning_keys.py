"""What is learnt, and how: objective, initial weights, optimizer and schedule."""

from __future__ import annotations

from lm.config.key import Key

LEARNING: dict[str, Key] = {
    # --- objective
    "objective.name": Key(
        "causal",
        "What is learnt.",
        choices=(
            "causal",
            "prefix",
            "masked",
            "span_corruption",
            "seq2seq",
            "classification",
            "span_qa",
            "skip_gram",
        ),
    ),
    "objective.label_smoothing": Key(
        0.0, "Part of a target's probability spread over the vocabulary.", low=0.0, high=0.99
    ),
    "objective.z_loss": Key(0.0, "Weight of the squared log-partition (T5, PaLM).", low=0.0),
    "objective.mask_rate": Key(
        0.15, "Part of the tokens that masked predicts.", low=0.001, high=1.0
    ),
    "objective.whole_word": Key(False, "Mask all tokens of a word together."),
    "objective.next_sentence": Key(False, "Masked: also predict whether B follows A (BERT)."),
    "objective.noise_density": Key(
        0.15, "Part of the tokens that span corruption removes.", low=0.001, high=0.9
    ),
    "objective.mean_span": Key(3.0, "Mean length of a corrupted span.", low=1.0),
    "objective.window": Key(5, "Skip-gram: words on either side.", low=1),
    "objective.negatives": Key(5, "Skip-gram: noise words a pair.", low=1),
    "objective.subsample": Key(
        1e-4, "Skip-gram: threshold above which frequent words are dropped; 0: never.", low=0.0
    ),
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
    "optimizer.adamw.bias_correction": Key(
        True, "Divide the moments by what they lack in the first steps; BERT's code does not."
    ),
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
        choices=("constant", "cosine", "linear", "inverse", "inverse_sqrt", "step", "wsd"),
    ),
    "schedule.warmup_steps": Key(0, "Steps of linear warm-up.", low=0),
    "schedule.hold_steps": Key(0, "Steps at the peak before any decay.", low=0),
    "schedule.decay_steps": Key(
        0,
        "Step at which cosine, linear, inverse and wsd reach the last rate; 0: train.steps.",
        low=0,
    ),
    "schedule.final_ratio": Key(0.1, "Last learning rate over the peak.", low=0.0, high=1.0),
    "schedule.step_every": Key(1000, "Steps from one fall of step to the next.", low=1),
    "schedule.step_factor": Key(0.5, "What step multiplies the rate by.", low=0.0, high=1.0),
    "schedule.wsd_decay_fraction": Key(
        0.2, "Part of decay_steps in which wsd goes down.", low=0.0, high=1.0
    ),
}
