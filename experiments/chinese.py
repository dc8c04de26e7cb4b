"""Classical Chinese verse: a SentencePiece tokenizer and a small decoder, on 0.93M characters.

Five per cent of the poems are held out for validation, which is measured in bits per UTF-8 byte.
RESULTS.md has our result and a sample.

    LM_DATA_DIR=DIR lm train --config experiments/chinese.py --workdir runs/chinese
    lm generate --workdir runs/chinese --prompt 春 --top_p 0.9
"""

from lm.config import choose, default

VARIANTS = ("small",)


def get_config(variant="small"):
    choose(dict.fromkeys(VARIANTS), variant)
    config = default()

    model = config.model
    model.n_layers, model.d_model, model.n_heads = 4, 192, 4
    model.positions, model.norm, model.bias = "rotary", "rmsnorm", False
    model.dropout = 0.1

    data = config.data
    data.source = "text:chinese/poetry.txt.gz"
    data.documents = "line"
    data.validation_fraction = 0.05
    data.tokenizer, data.tokenizer_vocab_size = "sentencepiece", 10_000
    data.sequence_length, data.batch_size = 128, 8

    config.optimizer.name, config.optimizer.learning_rate = "muon", 0.02
    config.optimizer.weight_decay = 0.05
    config.schedule.name, config.schedule.final_ratio = "linear", 0.0
    config.schedule.warmup_steps = 50
    config.train.steps = 1500
    config.train.scan_unroll, config.train.loss_chunk = 0, 32
    config.train.steps_per_dispatch = 10
    config.eval.every_steps, config.eval.best = 250, "-loss"
    config.checkpoint.every_steps = 250
    config.log.tensorboard = False
    return config
