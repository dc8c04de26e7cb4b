"""The default experiment: a GPT on the source code of Python's standard library.

The text is on every machine, so there is nothing to download. A hash of the file names chooses the
files held out for validation. `scripts/quickstart.sh` trains it in five minutes on two CPU cores;
RESULTS.md has the results.

    lm train --config experiments/stdlib.py --workdir runs/stdlib
"""

from lm.config import choose, default

VARIANTS = {  # layers, d_model, heads, steps
    "small": (4, 192, 6, 1800),
    "tiny": (2, 64, 4, 100),
}


def get_config(variant="small"):
    n_layers, d_model, n_heads, steps = choose(VARIANTS, variant)
    config = default()

    model = config.model
    model.n_layers, model.d_model, model.n_heads = n_layers, d_model, n_heads
    model.norm, model.positions, model.activation = "rmsnorm", "rotary", "gelu_tanh"
    model.bias = model.norm_bias = False

    data = config.data
    data.source = "stdlib"
    data.tokenizer, data.tokenizer_vocab_size = "sentencepiece", 4096
    data.sequence_length, data.batch_size = 128, 8

    config.train.steps = steps
    config.train.scan_unroll, config.train.steps_per_dispatch = 0, 5
    config.optimizer.name, config.optimizer.learning_rate = "muon", 0.04
    config.optimizer.muon.adam_ratio = 0.15
    config.schedule.name, config.schedule.final_ratio = "linear", 0.0
    config.schedule.warmup_steps = steps // 20
    config.eval.every_steps, config.eval.max_batches = 250, 20
    return config
