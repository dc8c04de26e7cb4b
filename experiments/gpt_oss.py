"""gpt-oss (OpenAI 2025, arXiv 2508.10925, Table 1).

| variant | parameters      | active        | paper's       | tokens | FLOPs  | expected   |
|---------|-----------------|---------------|---------------|--------|--------|------------|
| 20b     | 20,914,757,184  | 4,187,440,704 | 20.91B, 3.61B | 4T *   | 7.3e22 |            |
| 120b    | 116,829,156,672 | 5,711,982,912 | 116.8B, 5.13B | 4T *   | 1.1e23 |            |
| tiny    |                 |               |               |        |        | for trials |

Sizes are those of the released configurations. The model card's scores were not checked, so none
are listed. Its active parameters exclude the token embeddings. * Data ("trillions of tokens") and
recipe are not published: both are Llama 2's.

A Llama with biases and attention sinks: one learned logit per head in the denominator of the
softmax. Every other layer has a sliding window of 128 tokens. Each token uses 4 of 32 or 128
experts, from a router with a bias, weighted by the softmax over their logits. An expert clips its
gate at 7 and its linear input to ±7, to which it adds 1. YaRN extends the context from 4,096 to
131,072 tokens, and the models are defined with it. The balance loss is that of the released
configuration, 0.9 averaged over layers; here layers are summed, so it is 0.9 · 4 / layers each.

    lm train --config experiments/gpt_oss.py:20b --workdir runs/gpt-oss \\
        --config.parallel.mesh.data=1 --config.parallel.mesh.fsdp=-1 \\
        --config.parallel.mesh.expert=8 --config.data.source=jsonl:DIR/*.jsonl.gz \\
        --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default, fill
from lm.recipes import llama_block, llama_training, trial

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads model.n_kv_heads model.head_dim model.d_ff "
    "model.vocab_size model.n_experts model.window"
)
VARIANTS = {
    "tiny": ("", 4, 128, 4, 2, 32, 176, 0, 8, 32),
    "20b": ("gpt-oss-20b", 24, 2880, 64, 8, 64, 2880, 201_088, 32, 128),
    "120b": ("gpt-oss-120b", 36, 2880, 64, 8, 64, 2880, 201_088, 128, 128),
}


def get_config(variant="20b"):
    config = default()
    model = config.model
    llama_block(config)
    fill(config, COLUMNS, choose(VARIANTS, variant))
    model.bias = model.router_bias = model.attention_sinks = True
    model.activation, model.global_every = "swiglu_clipped", 2
    model.experts_per_token = 2 if variant == "tiny" else 4
    model.balance_loss = 0.9 * model.experts_per_token / model.n_layers
    if variant == "tiny":
        config.optimizer.learning_rate = 3e-3
        trial(config)
        return config

    model.rope_theta, model.rope_scaling, model.rope_factor = 1.5e5, "yarn", 32.0
    model.rope_high_frequency, model.rope_original_length = 32.0, 4096
    model.rope_truncate, model.max_length = False, 131_072
    config.data.sequence_length, config.optimizer.learning_rate = 4096, 3e-4
    llama_training(config, tokens=4e12)
    config.data.tokenizer = "tokenizers:gpt-oss.json"
    return config
