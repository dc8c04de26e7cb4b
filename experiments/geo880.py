"""Geo880, questions to lambda calculus: an LSTM encoder–decoder (Dong and Lapata 2016).

The paper's sequence-to-sequence model with attention answers 84.6 % of the 280 test questions
exactly; our result is in RESULTS.md. One layer of 300 units in each stack, a bidirectional encoder,
dropout 0.5, label smoothing 0.1, Adam. `dev` holds out a quarter of the 600 training questions to
choose the settings, with as many epochs over the rest; `final` trains on all of them.
`--config.data.validation_seed` chooses another quarter. Six rows of several questions each are
about 20 questions per step.

    LM_DATA_DIR=DIR lm train --config experiments/geo880.py --workdir runs/geo880
    LM_DATA_DIR=DIR lm eval --workdir runs/geo880 --task --split test
"""

from lm.config import choose, default

VARIANTS = {"final": (0.0, 3000), "dev": (0.25, 2200)}  # part held out; about 100 epochs


def get_config(variant="final"):
    held_out, steps = choose(VARIANTS, variant)
    config = default()

    model = config.model
    model.family = "lstm_encoder_decoder"
    model.n_layers, model.d_model, model.d_hidden = 1, 300, 300
    model.bidirectional = True
    model.tie_embeddings = False
    model.dropout = 0.5
    model.init, model.init_std = "uniform", 0.08

    config.objective.name, config.objective.label_smoothing = "seq2seq", 0.1
    data = config.data
    data.source, data.test_source = "tsv:geo880/train.txt", "tsv:geo880/test.txt"
    data.columns, data.header = "source=0,target=1", False
    data.validation_fraction = held_out
    data.tokenizer, data.tokenizer_min_count = "words", 2
    data.sequence_length, data.target_length = 36, 72
    data.batch_size = 6

    config.optimizer.learning_rate, config.optimizer.weight_decay = 2e-3, 0.0
    config.optimizer.adamw.b2, config.optimizer.clip_norm = 0.99, 5.0
    config.schedule.name, config.schedule.final_ratio = "linear", 0.02
    config.train.steps = steps
    config.train.steps_per_dispatch = 10
    config.eval.every_steps = 300
    config.eval.metrics = "logical_form_match,exact_match"
    config.checkpoint.every_steps = 300
    config.log.tensorboard = False
    config.decode.beam_size, config.decode.length_penalty = 5, 0.0
    return config
