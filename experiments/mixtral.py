"""Mixtral 8×7B (Jiang et al. 2024, Table 1) and 8×22B (Mistral AI 2024, released configuration).

| variant | layers | d_model | heads | d_ff  | parameters      | active a token |
|---------|--------|---------|-------|-------|-----------------|----------------|
| 8x7b    | 32     | 4096    | 32/8  | 14336 | 46,702,792,704  | 12,879,925,248 |
| 8x22b   | 56     | 6144    | 48/8  | 16384 | 140,620,634,112 | 39,152,031,744 |

A Llama whose feed-forward layers are eight experts, of which each token uses two, weighted by the
softmax over their two logits; nothing is dropped. The paper publishes no training recipe: this is
Llama 2's, with the balance loss of the released configuration, 0.02: there both choices count, and
layers are averaged; here loads add up to 1, and layers are summed, so 0.02 · 2 / layers each.

    lm train --config experiments/mixtral.py:8x7b --workdir runs/mixtral \\
        --config.parallel.mesh.data=1 --config.parallel.mesh.fsdp=-1 \\
        --config.parallel.mesh.expert=8 --config.data.source=jsonl:DIR/*.jsonl.gz \\
        --config.data.tokenizer=sentencepiece:FILE.model

`tiny` trains on the embedded corpus; it is for trying things out.
"""

from lm.config import choose, default

# paper entry, layers, d_model, heads, key/value heads, d_ff, vocabulary, context, theta, lr
VARIANTS = {
    "tiny": ("", 4, 128, 4, 2, 176, 0, 256, 1e4, 3e-3),
    "8x7b": ("mixtral-8x7b", 32, 4096, 32, 8, 14336, 32000, 32768, 1e6, 3e-4),
    "8x22b": ("mixtral-8x22b", 56, 6144, 48, 8, 16384, 32000, 65536, 1e6, 1.5e-4),
}


def get_config(variant="8x7b"):
    config = default()
    model, data = config.model, config.data
    (
        config.paper,
        model.n_layers,
        model.d_model,
        model.n_heads,
        model.n_kv_heads,
        model.d_ff,
        model.vocab_size,
        data.sequence_length,
        model.rope_theta,
        config.optimizer.learning_rate,
    ) = choose(VARIANTS, variant)
    model.norm, model.positions, model.activation = "rmsnorm", "rotary", "swiglu"
    model.bias = model.norm_bias = model.scale_residual_init = model.tie_embeddings = False
    model.n_experts, model.experts_per_token = 8, 2
    model.balance_loss = 0.02 * model.experts_per_token / model.n_layers
    config.optimizer.adamw.b2 = 0.95

    if variant == "tiny":
        data.batch_size = 16
        config.train.steps = 500
        config.schedule.warmup_steps = 50
        return config

    data.source = "jsonl:corpus/*.jsonl.gz"
    data.tokenizer = "sentencepiece:tokenizer.model"
    data.validation_fraction = 0.0005
    data.batch_size = 4_194_304 // data.sequence_length
    config.train.steps, config.train.remat = 500_000, "full"
    config.schedule.warmup_steps = 2000
    config.eval.every_steps, config.eval.max_batches = 1000, 10
    return config
