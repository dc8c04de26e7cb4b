"""Alternatives to the residual sum: hyper-connections and value residuals, on stdlib.

Hyper-connections (Zhu et al. 2024, arXiv 2409.19606) and value residuals (ResFormer; Zhou et al.
2024, arXiv 2410.17897), alone and together, to try out the code: the model is small, and 200 steps,
about 40 seconds on one core, are too few to rank them.

    lm train --config experiments/residuals.py:hyper --workdir runs/hyper
"""

from lm.config import choose, default, set_value

VARIANTS = {  # keys of section "model"
    "hyper": {"residual": "hyper"},
    "hyper-static": {"residual": "hyper", "hyper_dynamic": False},
    "values": {"value_residual": "learned"},
    "values-fixed": {"value_residual": "fixed"},
    "hyper-values": {"residual": "hyper", "value_residual": "learned"},
    "sum": {},
}


def get_config(variant="hyper"):
    config = default()

    model = config.model
    model.n_layers, model.d_model, model.n_heads = 4, 64, 4
    model.norm, model.positions, model.activation = "rmsnorm", "rotary", "gelu_tanh"
    model.bias = model.norm_bias = False
    for name, value in choose(VARIANTS, variant).items():
        set_value(config, f"model.{name}", value)

    data = config.data
    data.source = "stdlib"
    data.tokenizer, data.tokenizer_vocab_size = "sentencepiece", 2048
    data.sequence_length, data.batch_size = 128, 4

    config.train.steps, config.train.steps_per_dispatch = 200, 10
    config.optimizer.learning_rate = 4e-3
    config.schedule.name, config.schedule.final_ratio = "linear", 0.0
    config.schedule.warmup_steps = 10
    config.eval.every_steps, config.eval.max_batches = 100, 25
    return config
