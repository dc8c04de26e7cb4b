"""Whisper (Radford et al. 2022): speech recognition with an encoder–decoder, 30 seconds at a time.

| variant        | parameters    | paper's | tokens  | FLOPs  | expected |
|----------------|---------------|---------|---------|--------|----------|
| tiny           | 37,184,640    | 39M     | 523B    | 2.7e19 | WER 7.6  |
| base           | 71,825,920    | 74M     | 523B    | 7.2e19 | WER 5.0  |
| small          | 240,582,912   | 244M    | 523B    | 3.2e20 | WER 3.4  |
| medium         | 762,321,920   | 769M    | 523B    | 1.1e21 | WER 2.9  |
| large          | 1,541,384,960 | 1550M   | 523B    | 2.3e21 | WER 2.7  |
| tiny.en        | 37,184,256    | 39M     | 523B    | 2.7e19 | WER 5.6  |
| base.en        | 71,825,408    | 74M     | 523B    | 7.2e19 | WER 4.2  |
| small.en       | 240,582,144   | 244M    | 523B    | 3.2e20 | WER 3.1  |
| medium.en      | 762,320,896   | 769M    | 523B    | 1.1e21 | WER 3.1  |
| large-v2       | 1,541,384,960 | 1550M   | 1.31T   | 5.8e21 | WER 2.7  |
| large-v3       | 1,541,570,560 | 1550M * | 1.31T * | 5.8e21 |          |
| large-v3-turbo | 806,958,080   | 809M *  | 1.31T * | 4.1e21 |          |

Greedy word error rate on LibriSpeech test-clean (Table 8) and the recipe (Appendix F) are from
memory, not checked against the paper. * From the release; no recipe is published for these two
models, so they use that of large-v2. Only trained parameters are counted; transformers also counts
the encoder's fixed sinusoids, 1,500 × d_model.

Log-mel features of 80 bins (128 since v3), two convolutions, pre-norm, GELU, no key biases, 448
learned decoder positions, tied output. A target begins with its language and task tokens, here
English transcription without time stamps. The paper's mixture of 98 languages, translation, voice
activity detection and preceding text (§2.3) is up to the data. 256 segments of 30 s (1,024 since
v2), 1,048,576 updates (655,360), AdamW, linear decay to 0, no dropout; v2 adds SpecAugment, and
stochastic depth and BPE dropout, which lm does not have.

    lm train --config experiments/whisper.py:tiny.en --workdir runs/whisper \
        --config.data.source=audio:DIR --config.data.tokenizer=folder:WHISPER_DIR
"""

from lm.config import choose, default, fill

COLUMNS = (
    "paper model.n_layers model.n_decoder_layers model.d_model model.n_heads "
    "model.vocab_size model.n_mels optimizer.learning_rate"
)
VARIANTS = {
    "tiny": ("whisper-tiny", 4, 4, 384, 6, 51_865, 80, 1.5e-3),
    "base": ("whisper-base", 6, 6, 512, 8, 51_865, 80, 1e-3),
    "small": ("whisper-small", 12, 12, 768, 12, 51_865, 80, 5e-4),
    "medium": ("whisper-medium", 24, 24, 1024, 16, 51_865, 80, 2.5e-4),
    "large": ("whisper-large", 32, 32, 1280, 20, 51_865, 80, 1.75e-4),
    "tiny.en": ("whisper-tiny.en", 4, 4, 384, 6, 51_864, 80, 1.5e-3),
    "base.en": ("whisper-base.en", 6, 6, 512, 8, 51_864, 80, 1e-3),
    "small.en": ("whisper-small.en", 12, 12, 768, 12, 51_864, 80, 5e-4),
    "medium.en": ("whisper-medium.en", 24, 24, 1024, 16, 51_864, 80, 2.5e-4),
    "large-v2": ("whisper-large-v2", 32, 32, 1280, 20, 51_865, 80, 2e-4),
    "large-v3": ("whisper-large-v3", 32, 32, 1280, 20, 51_866, 128, 2e-4),
    "large-v3-turbo": ("whisper-large-v3-turbo", 32, 4, 1280, 20, 51_866, 128, 2e-4),
}


def get_config(variant="tiny"):
    config = default()
    model, data, optimizer, schedule = config.model, config.data, config.optimizer, config.schedule
    fill(config, COLUMNS, choose(VARIANTS, variant))
    model.family, model.max_source_length, model.max_length = "encoder_decoder", 1500, 448
    model.attention_bias, model.activation = "no_key", "gelu_erf"
    model.init, model.scale_residual_init = "fan_in", False

    config.objective.name = "transcription"
    data.source, data.tokenizer = "audio:corpus", "folder:whisper"
    data.validation_fraction = 0.001
    data.sequence_length, data.target_length, data.n_mels = 1500, 448, model.n_mels
    english = variant.endswith(".en")
    data.target_prefix = "<|notimestamps|>" if english else "<|en|>,<|transcribe|>,<|notimestamps|>"

    optimizer.adamw.b1, optimizer.adamw.b2, optimizer.adamw.eps = 0.9, 0.98, 1e-6
    optimizer.weight_decay, optimizer.clip_norm = 0.1, 1.0
    schedule.name, schedule.final_ratio, schedule.warmup_steps = "linear", 0.0, 2048
    has_v2_recipe = variant.startswith("large-")
    data.batch_size, config.train.steps = (1024, 655_360) if has_v2_recipe else (256, 1_048_576)
    if has_v2_recipe:
        config.objective.masks = 1  # SpecAugment of LibriSpeech Basic
    config.eval.every_steps, config.eval.batch_size, config.eval.max_batches = 5000, 64, 20
    return config
