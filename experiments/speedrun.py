"""Optimizer comparison: steps to a target validation loss on one model, batch and corpus.

A GPT of 1.05 million parameters on the source code of Python's standard library, 400 batches of 512
tokens, about a minute on one core. A variant is an optimizer at its best learning rate in
RESULTS.md. All share model, batch, data, warmup, weight decay, clipping and the linear decay to 0,
which only the schedule-free optimizer does without.

    scripts/speedrun.py --output runs/speedrun.jsonl    # all rates, then the best, three seeds
    lm train --config experiments/speedrun.py:soap --workdir runs/soap
"""

from lm.config import choose, default

OPTIMIZERS = {  # learning rate, keys of section "optimizer"
    "adamw": (2e-3, {"name": "adamw"}),
    "adamw-cautious-updates": (2e-3, {"name": "adamw", "cautious": "updates"}),
    "adamw-cautious-decay": (2e-3, {"name": "adamw", "cautious": "decay"}),
    "adamw-ema": (2e-3, {"name": "adamw", "ema": 0.98}),
    "adafactor": (8e-2, {"name": "adafactor"}),
    "lion": (5e-4, {"name": "lion"}),
    "sgd": (0.25, {"name": "sgd"}),
    "ademamix": (1e-3, {"name": "ademamix", "ademamix.b3": 0.999, "ademamix.rise_steps": 400}),
    "schedule-free": (2e-3, {"name": "schedule_free", "schedule_free.b2": 0.95}),
    "soap": (4e-3, {"name": "soap", "soap.max_dim": 512}),
    "muon": (4e-2, {"name": "muon", "muon.adam_ratio": 0.15}),
    "muon-rms": (8e-3, {"name": "muon", "muon.adam_ratio": 1.0, "muon.rms": 0.2}),
    "normuon": (4e-2, {"name": "muon", "muon.adam_ratio": 0.15, "muon.neuron_b2": 0.95}),
}
TARGET = 5.2  # validation loss, nats per token


def get_config(variant="muon"):
    rate, options = choose(OPTIMIZERS, variant)
    config = default()

    model = config.model
    model.n_layers, model.d_model, model.n_heads = 4, 128, 4
    model.norm, model.positions, model.activation = "rmsnorm", "rotary", "gelu_tanh"
    model.bias = model.norm_bias = False

    data = config.data
    data.source = "stdlib"
    data.tokenizer, data.tokenizer_vocab_size = "sentencepiece", 2048
    data.sequence_length, data.batch_size = 128, 4

    config.train.steps, config.train.steps_per_dispatch = 400, 25
    config.train.scan_unroll = 0
    is_free = options["name"] == "schedule_free"
    config.schedule.name = "constant" if is_free else "linear"
    config.schedule.warmup_steps, config.schedule.final_ratio = 20, 0.0
    config.eval.every_steps, config.eval.max_batches = 25, 25
    config.optimizer.learning_rate = rate
    config.optimizer.update_from_flattened_dict(options)
    return config
