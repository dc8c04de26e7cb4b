"""Skip-gram with negative sampling (Mikolov 2013b) on WikiText-2."""

from lm.config import choose, default

VARIANTS = {"wikitext2": 100}  # d_model


def get_config(variant="wikitext2"):
    config = default()

    model = config.model
    model.family = "skip_gram"
    model.d_model = choose(VARIANTS, variant)
    model.init_std = 0.01
    model.vocab_size = 22_000

    config.objective.name = "skip_gram"
    config.objective.window, config.objective.negatives = 5, 5
    config.objective.subsample = 1e-4

    data = config.data
    data.source = "text:wikitext2/wiki.train.tokens*"
    data.validation_source = "text:wikitext2/wiki.valid.tokens*"
    data.tokenizer, data.lowercase = "words", True
    data.tokenizer_vocab_size, data.tokenizer_min_count = 100_000, 5
    data.sequence_length, data.batch_size = 128, 64
    return config
