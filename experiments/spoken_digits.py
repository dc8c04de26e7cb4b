"""Spoken digits: a small model with Whisper's architecture and objective, on one CPU core.

Recordings are one to seven English digits, synthesized by espeak-ng with added noise
(`scripts/spoken_digits.py`). Validation and test speakers are not in the training data. Word error
rates are in RESULTS.md.

    python scripts/spoken_digits.py DIR/spoken_digits
    LM_DATA_DIR=DIR lm train --config experiments/spoken_digits.py --workdir runs/spoken_digits
    LM_DATA_DIR=DIR lm eval --workdir runs/spoken_digits --best --task --split test
"""

from lm.config import default


def get_config():
    config = default()

    model = config.model
    model.family = "encoder_decoder"
    model.n_layers, model.n_decoder_layers = 2, 1
    model.d_model, model.n_heads, model.d_ff = 64, 4, 192
    model.positions, model.max_length = "learned", 16
    model.attention_bias, model.activation = "no_key", "gelu_erf"
    model.n_mels = 40
    model.init = "fan_in"  # with 0.02, positions would drown the features

    config.objective.name = "transcription"
    config.objective.masks, config.objective.mask_frames, config.objective.mask_bins = 2, 20, 8
    data = config.data
    data.source = "audio:spoken_digits/train/one_digit.csv,audio:spoken_digits/train"
    data.schedule = (
        "0: 1 0; 300: 1 0; 600: 0.1 0.9"  # single digits first, so that attention learns to align
    )
    data.validation_source = "audio:spoken_digits/validation"
    data.test_source = "audio:spoken_digits/test"
    data.n_mels = 40
    data.tokenizer, data.tokenizer_min_count = "words", 1
    data.sequence_length, data.target_length = 160, 16  # 3.2 s
    data.batch_size = 16

    config.optimizer.name, config.optimizer.learning_rate = "muon", 0.02
    config.optimizer.muon.adam_ratio, config.optimizer.weight_decay = 0.15, 0.01
    config.optimizer.adamw.b2, config.optimizer.clip_norm = 0.98, 1.0
    config.schedule.name, config.schedule.warmup_steps = "cosine", 100
    config.train.steps = 16_000
    config.train.steps_per_dispatch, config.train.scan_unroll = 10, 0
    config.eval.every_steps = 500
    config.eval.metrics = "wer"
    config.eval.best = "-loss"
    config.checkpoint.every_steps = 500
    config.log.tensorboard = False
    config.decode.beam_size = 1
    return config
