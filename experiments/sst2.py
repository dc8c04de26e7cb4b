"""SST-2, sentence sentiment: the models that papers compare with, and a fine-tuned one.

| variant     | model                                             | published test accuracy      |
|-------------|---------------------------------------------------|------------------------------|
| lstm        | bidirectional LSTM, 150 units each way, max-pool  | 84.9 LSTM, 87.5 BiLSTM       |
| transformer | 2 layers, d 50, 5 heads, pooled first token        | –                            |
| minilm      | 6 layers, d 384, 12 heads, imported and fine-tuned | –                            |

The first two start from GloVe vectors of 50 dimensions (300 in the published results, Tai et al.
2015). All train on the 67,349 phrases of GLUE. The checkpoint that is best on the 872 dev sentences
is tested once, on the 1,821 labeled test sentences. Our results are in RESULTS.md.

    LM_DATA_DIR=DIR lm train --config experiments/sst2.py:lstm --workdir runs/sst2
    LM_DATA_DIR=DIR lm eval --workdir runs/sst2 --best --task --split test

MiniLM (all-MiniLM-L6-v2) is fine-tuned for 1.4 epochs:

    lm import --from FOLDER --workdir runs/minilm
    LM_DATA_DIR=DIR lm train --config experiments/sst2.py:minilm --workdir runs/sst2_minilm \
        --config.init.from=runs/minilm --config.data.tokenizer=run:runs/minilm
"""

from lm.config import choose, default

VARIANTS = ("lstm", "transformer", "minilm")


def get_config(variant="lstm"):
    choose(dict.fromkeys(VARIANTS), variant)
    config = default()

    model = config.model
    model.d_model = 50
    if variant == "lstm":
        model.family, model.bidirectional = "lstm", True
        model.n_layers, model.d_hidden = 1, 300
        model.init, model.init_std = "uniform", 0.08
        model.dropout = 0.5
    elif variant == "transformer":
        model.family = "encoder"
        model.n_layers, model.n_heads, model.d_ff = 2, 5, 200
        model.positions, model.activation = "sinusoidal", "relu"
        model.init, model.init_std, model.scale_residual_init = "xavier", 0.1, False
        model.dropout = 0.2

    config.objective.name = "classification"
    data = config.data
    data.source = "tsv:sst2/glue/train.tsv.gz"
    data.validation_source = "tsv:sst2/glue/dev.tsv"
    data.test_source = "tsv:sst2/glue/test-labeled.tsv"
    data.columns, data.labels = "text=sentence,label=label", "0,1"
    data.tokenizer, data.tokenizer_vocab_size = "words", 20_000
    data.sequence_length, data.batch_size = 64, 64
    config.init.vectors = "glove/glove.6B.50d.top20k.txt.gz"

    config.optimizer.learning_rate, config.optimizer.weight_decay = 1e-3, 1e-4
    config.optimizer.adamw.b2 = 0.999
    config.schedule.name, config.schedule.final_ratio = "linear", 0.05
    config.train.steps = 5000  # 4.75 epochs
    config.train.scan_unroll, config.train.steps_per_dispatch = 0, 10
    config.eval.every_steps, config.eval.batch_size = 500, 109
    config.eval.best = "accuracy"
    config.checkpoint.every_steps = 500
    config.log.tensorboard = False

    if variant == "minilm":
        model.family = "encoder"
        model.n_layers, model.d_model, model.n_heads = 6, 384, 12
        model.vocab_size, model.max_length, model.token_types = 30_522, 512, 2
        model.norm_placement, model.norm_eps, model.embedding_norm = "post", 1e-12, True
        model.activation, model.dropout, model.dtype = "gelu_erf", 0.1, "bfloat16"
        data.sequence_length, data.batch_size = 48, 32
        config.init.vectors, config.init.fresh = "", "classifier"
        config.optimizer.learning_rate, config.optimizer.weight_decay = 5e-5, 0.01
        config.schedule.warmup_steps, config.schedule.final_ratio = 120, 0.0
        config.train.steps = 3000  # 1.4 epochs
    return config
