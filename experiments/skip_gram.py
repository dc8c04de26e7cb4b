"""Skip-gram with negative sampling (Mikolov 2013b) on WikiText-2, lower-cased.

Spearman's correlation of cosine and human similarity, over the pairs whose words are known:

| vectors                                  | WS-353 (of 353) | MEN (of 3,000) | SimLex (of 999) |
|------------------------------------------|-----------------|----------------|-----------------|
| `wikitext2`: d 100, 20 epochs            | 0.579 (299)     | 0.535 (2,075)  | 0.227 (838)     |
| gensim 4.4's word2vec, 10 epochs         | –               | 0.432 (2,075)  | 0.213 (838)     |
| GloVe 6B, d 50, its 20,000 first words   | 0.522 (319)     | 0.684 (2,278)  | 0.271 (923)     |
| GloVe 6B, d 50, whole                    | 0.5033          | 0.6523         | 0.2646          |

gensim was trained on the same text with the same window, negatives, subsampling and min_count.
Options were chosen by MEN; WS-353 was evaluated once. GloVe was trained on 6 billion words, this
model on 2 million.

The training step is word2vec's: SGD with a rate that falls linearly from 0.025 per pair. The
trainer averages over the pairs of a batch, about 4,600, hence the learning rate of 125. AdamW at
0.002 with batches of 64 needs 10 epochs for the validation loss that SGD reaches in 4 (2.494 and
2.488 nats per pair).

Data: the word-level WikiText-2 files (plain or .gz) in the folder `wikitext2` under $LM_DATA_DIR. A
step of 2,048 words takes 30 ms of CPU time: about 10 minutes in all.

    LM_DATA_DIR=DIR lm train --config experiments/skip_gram.py --workdir runs/skip_gram
    lm vectors --workdir runs/skip_gram --output vectors.txt.gz --similarity EN-WS-353-ALL.txt
"""

from lm.config import choose, default

VARIANTS = {"wikitext2": (100, 20_000)}  # d_model, steps


def get_config(variant="wikitext2"):
    d_model, steps = choose(VARIANTS, variant)
    config = default()

    model = config.model
    model.family = "skip_gram"
    model.d_model = d_model
    model.vocab_size = 20_488

    objective = config.objective
    objective.name = "skip_gram"
    objective.window, objective.negatives, objective.subsample = 5, 5, 1e-4

    data = config.data
    data.source = "text:wikitext2/wiki.train.tokens*"
    data.validation_source = "text:wikitext2/wiki.valid.tokens*"
    data.tokenizer, data.lowercase = "words", True
    data.tokenizer_vocab_size, data.tokenizer_min_count = 100_000, 5  # all words with that count
    data.sequence_length, data.batch_size = 128, 16

    config.optimizer.name, config.optimizer.sgd.momentum = "sgd", 0.0
    config.optimizer.learning_rate = 125.0
    config.optimizer.weight_decay = config.optimizer.clip_norm = 0.0
    config.schedule.name, config.schedule.final_ratio = "linear", 0.0

    config.train.steps, config.train.steps_per_dispatch = steps, 20
    config.eval.every_steps, config.eval.batch_size = 5000, 64
    config.checkpoint.every_steps = 5000
    config.log.every_steps, config.log.tensorboard = 20, False
    return config
