"""LSTM language models of Penn Treebank (Zaremba et al. 2014, Table 1 and §4.1).

| variant | parameters | paper's | tokens | FLOPs  | expected              |
|---------|------------|---------|--------|--------|-----------------------|
| small   | 4,653,200  |         | 12.1M  | 4.7e13 | test perplexity 114.5 |
| medium  | 19,780,400 |         | 36.2M  | 1.5e15 | test perplexity 82.7  |
| large   | 66,034,000 |         | 51.1M  | 1.1e16 | test perplexity 78.4  |

The paper gives no parameter counts. Small is Table 1's non-regularized LSTM, with the sizes of the
authors' code: 200 units, unrolled over 20 words, 13 epochs. Medium and large (§4.1): 650 and 1,500
units, 35 words, dropout 0.5 and 0.65, initialization U(± 0.05) and U(± 0.04) (small: 0.1), 39 and
55 epochs; the learning rate is divided by 1.2 after each epoch from the 7th on, and by 1.15 from
the 15th on.

Two layers with dropout between them but not over time, an untied output matrix, and the state
carried from one batch of 20 × 35 (small: 20 × 20) words to the next; SGD, gradients clipped at 5
(large: 10). As in the authors' code, each layer has two bias vectors.

The authors sum the gradients over a row's words and use learning rate 1; here they are averaged, so
a learning rate of 35 and clipping at 5/35 give the same updates.

    lm train --config experiments/zaremba.py:medium --workdir runs/zaremba \
        --config.data.source=text:DIR/ptb.train.txt \
        --config.data.validation_source=text:DIR/ptb.valid.txt
"""

from lm.config import choose, default

VARIANTS = {  # paper entry, units, words, dropout, init, epochs, epochs at the peak, decay, clip
    "small": ("zaremba-small", 200, 20, 0.0, 0.1, 13, 4, 2.0, 5),
    "medium": ("zaremba-medium", 650, 35, 0.5, 0.05, 39, 6, 1.2, 5),
    "large": ("zaremba-large", 1500, 35, 0.65, 0.04, 55, 14, 1.15, 10),
}
TRAINING_WORDS = 929_589  # of Penn Treebank, including <eos>


def get_config(variant="medium"):
    paper, units, length, dropout, init, epochs, at_peak, decay, clip = choose(VARIANTS, variant)
    config = default()
    config.paper = paper

    model = config.model
    model.family, model.carry = "lstm", True
    model.n_layers, model.d_model, model.vocab_size = 2, units, 10_000
    model.tie_embeddings = False
    model.init, model.init_std, model.dropout = "uniform", init, dropout

    data = config.data
    data.source, data.validation_source = "text:ptb/ptb.train.txt", "text:ptb/ptb.valid.txt"
    data.test_source = "text:ptb/ptb.test.txt"
    data.tokenizer, data.tokenizer_vocab_size = "words", 10_000
    data.order, data.isolate_documents = "contiguous", False
    data.sequence_length, data.batch_size = length, 20

    epoch = TRAINING_WORDS // data.batch_size // length
    optimizer, schedule = config.optimizer, config.schedule
    optimizer.name, optimizer.sgd.momentum = "sgd", 0.0
    optimizer.learning_rate, optimizer.clip_norm = float(length), clip / length
    optimizer.weight_decay = 0.0
    schedule.name, schedule.step_factor = "step", 1 / decay
    schedule.hold_steps, schedule.step_every = (at_peak - 1) * epoch, epoch
    config.train.steps = epochs * epoch
    config.eval.every_steps, config.eval.best = epoch, "-loss"
    return config
