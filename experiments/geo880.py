"""Geo880, questions to lambda calculus: an LSTM encoder–decoder (Dong and Lapata 2016).

The paper's sequence-to-sequence model with attention answers 84.6 % of the 280 test questions with
the right logical form; our result is in RESULTS.md. One layer of 300 units in each stack, a
bidirectional encoder, dropout 0.5, label smoothing 0.1, Adam. Half of the training questions are
recombined from the others (after Andreas 2020) by `scripts/recombine.py`:

    python scripts/recombine.py DIR/geo880/train.txt DIR/geo880_recombined
    LM_DATA_DIR=DIR lm train --config experiments/geo880.py --workdir runs/geo880
    LM_DATA_DIR=DIR lm eval --workdir runs/geo880 --task --average 5 --split test

`dev` holds out a quarter of the 600 training questions to choose the settings, with as many steps
per question; `final` trains on all of them. For other quarters use another `--seed` and folder,
and set `data.source` and `data.validation_source`:

    python scripts/recombine.py DIR/geo880/train.txt DIR/geo880_dev --held_out 0.25 --seed 0
    LM_DATA_DIR=DIR lm train --config experiments/geo880.py:dev --workdir runs/geo880_dev
    LM_DATA_DIR=DIR lm eval --workdir runs/geo880_dev --task --average 5
"""

from lm.config import choose, default

VARIANTS = {  # folder of the training questions; steps (of six rows, about 20 questions in all)
    "final": ("geo880_recombined", 3000),
    "dev": ("geo880_dev", 2200),
}


def get_config(variant="final"):
    folder, steps = choose(VARIANTS, variant)
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
    data.source, data.test_source = f"tsv:{folder}/train.txt", "tsv:geo880/test.txt"
    if variant == "dev":
        data.validation_source = f"tsv:{folder}/validation.txt"
    data.columns, data.header = "source=0,target=1", False
    data.tokenizer = "words"
    data.sequence_length, data.target_length = 36, 72
    data.batch_size = 6

    config.optimizer.learning_rate, config.optimizer.weight_decay = 2e-3, 0.0
    config.optimizer.adamw.b2, config.optimizer.clip_norm = 0.99, 5.0
    config.schedule.name, config.schedule.final_ratio = "linear", 0.02
    config.train.steps = steps
    config.train.steps_per_dispatch = 10
    config.eval.every_steps = 300
    config.eval.metrics = "logical_form_match,exact_match"
    config.checkpoint.every_steps, config.checkpoint.keep_last = 100, 5  # their mean is tested
    config.log.tensorboard = False
    config.decode.beam_size, config.decode.length_penalty = 5, 0.0
    return config
