"""The neural probabilistic language model (Bengio et al. 2003, Tables 1 and 2).

| variant | parameters | paper's | tokens | FLOPs  | expected                         |
|---------|------------|---------|--------|--------|----------------------------------|
| mlp9    | 2,158,273  |         | 16M    | 1.6e14 | test perplexity 276 (MLP10: 252) |
| mlp1    | 5,762,483  |         | 16M    | 4.6e14 | test perplexity 268 (MLP2: 257)  |
| ap      | 11,904,264 |         | 70M    | 4.2e15 | (mixed: 109)                     |

Perplexities in brackets are of an equal mixture with a trigram model, which lm does not have. The
paper's best n-grams reach 312 on Brown and 117 on AP News. It gives no parameter counts; these
follow from its formula (§2). Brown is split after 800,000 and 1,000,000 words, and words that occur
at most 3 times are merged into one.

In the paper, each word is a step, with a learning rate of 1e-3 / (1 + 1e-8 t) and weight decay of
1e-4 (AP News 1e-5). Here 128 words are one step with 128 times that rate, and t still counts words.
Brown took 10 to 20 epochs, AP News 5. The paper does not describe the initialization.

    lm train --config experiments/nplm.py:mlp9 --workdir runs/nplm \
        --config.data.source=text:DIR/train.txt --config.data.validation_source=text:DIR/valid.txt
"""

from lm.config import choose, default

# paper entry, window, hidden units, features, direct, vocabulary, folder, words, epochs, decay
VARIANTS = {
    "mlp9": ("nplm-brown-mlp9/10", 4, 100, 30, False, 16_383, "brown", 800_000, 20, 1e-4),
    "mlp1": ("nplm-brown-mlp1/2", 4, 50, 60, True, 16_383, "brown", 800_000, 20, 1e-4),
    "ap": ("nplm-apnews-mlp10", 5, 60, 100, True, 17_964, "apnews", 13_994_528, 5, 1e-5),
}


def get_config(variant="mlp9"):
    config = default()
    model, data, optimizer = config.model, config.data, config.optimizer
    (
        config.paper,
        model.context,
        model.d_hidden,
        model.d_model,
        model.direct,
        model.vocab_size,
        folder,
        words,
        epochs,
        optimizer.weight_decay,
    ) = choose(VARIANTS, variant)
    model.family = "nplm"
    model.init, model.init_std = "fan_in", 0.1

    data.source = f"text:{folder}/train.txt"
    data.validation_source = f"text:{folder}/valid.txt"
    data.test_source = f"text:{folder}/test.txt"
    data.tokenizer, data.tokenizer_min_count = "words", 4
    data.tokenizer_vocab_size = model.vocab_size
    data.isolate_documents = False
    data.sequence_length, data.batch_size = 32, 4

    optimizer.name, optimizer.sgd.momentum = "sgd", 0.0
    optimizer.learning_rate, optimizer.clip_norm = 1e-3 * 128, 0.0
    config.schedule.name = "inverse"
    config.schedule.final_ratio = 1 / (1 + 1e-8 * epochs * words)
    config.train.steps = epochs * words // 128
    config.train.steps_per_dispatch = 10
    config.eval.every_steps, config.eval.best = words // 128 // 10 * 10, "-loss"
    return config
