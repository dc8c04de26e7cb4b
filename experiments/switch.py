"""Switch Transformers (Fedus et al. 2021) on T5-base: Figure 4 and Table 9.

| variant  | parameters     | paper's | tokens | FLOPs  | expected                   |
|----------|----------------|---------|--------|--------|----------------------------|
| base-8   | 619,339,008    |         | 128B   | 7.6e19 |                            |
| base-128 | 7,415,217,408  | 7B      | 128B   | 7.7e19 | neg. log perplexity -1.561 |
| base-256 | 14,664,154,368 | 14.7B   | 128B   | 7.7e19 |                            |
| tiny     |                |         |        |        | for trying things out      |

Negative log perplexity after 100,000 steps with capacity factor 1.0 (Table 1). The paper's
parameter counts are from Table 9 (128 experts) and Figure 4 (256). Ours are those of Figure 4 and
the released checkpoints, with ReLU and d_ff 3072, where Table 9 lists a gated layer of 2048.

T5 1.0 (`t5.py`) with experts of the same width in every other feed-forward layer of both stacks.
Each token uses its most probable expert, multiplied by the probability (eq. 2). Balance loss 0.01
(eq. 4), router in float32 with 1 % input jitter, initialization with standard deviation √(0.1 /
inputs), truncated at two (§2.4), capacity factor 1.0 per row. No dropout in pretraining. Optimizer,
schedule and batch are T5's.

    lm train --config experiments/switch.py:base-8 --workdir runs/switch \\
        --config.parallel.mesh.expert=8 --config.data.source=jsonl:DIR/*.jsonl.gz \\
        --config.data.tokenizer=sentencepiece:FILE.model
"""

from lm.config import choose, default

VARIANTS = {  # paper entry, experts
    "tiny": ("", 4),
    "base-8": ("switch-base-8", 8),
    "base-128": ("switch-base-128", 128),
    "base-256": ("switch-base-256", 256),
}


def get_config(variant="base-8"):
    config = default()
    model, data = config.model, config.data
    config.paper, model.n_experts = choose(VARIANTS, variant)
    model.family = "encoder_decoder"
    model.n_layers, model.d_model, model.n_heads, model.d_ff = 12, 768, 12, 3072
    model.head_dim, model.vocab_size = 64, 32_128
    model.norm, model.norm_eps, model.bias = "rmsnorm", 1e-6, False
    model.positions, model.attention_scale = "relative", 1.0
    model.activation, model.scale_logits = "relu", True
    model.init, model.init_std, model.scale_residual_init = "fan_in", 1.0, False
    model.init_scale, model.init_truncated = 0.1, True
    model.experts_per_token, model.experts_every, model.expert_capacity = 1, 2, 1.0
    model.balance_loss, model.router_jitter = 0.01, 0.01

    config.objective.name, config.objective.z_loss = "span_corruption", 1e-4
    config.optimizer.name, config.optimizer.learning_rate = "adafactor", 0.01
    config.optimizer.weight_decay = config.optimizer.clip_norm = 0.0
    config.schedule.name, config.schedule.hold_steps = "inverse_sqrt", 10_000
    config.decode.beam_size, config.decode.length_penalty = 4, 0.6
    if variant == "tiny":
        model.n_layers, model.d_model, model.n_heads, model.d_ff = 4, 128, 4, 512
        model.head_dim, model.vocab_size = 32, 0
        data.sequence_length, data.batch_size, config.train.steps = 256, 16, 500
        return config

    data.source = "jsonl:c4/*.jsonl.gz"
    data.tokenizer = "sentencepiece:t5.model"
    data.validation_fraction = 0.0005
    data.sequence_length, data.batch_size = 512, 2048
    config.train.steps = 100_000
    config.eval.every_steps, config.eval.batch_size, config.eval.max_batches = 5000, 256, 20
    return config
