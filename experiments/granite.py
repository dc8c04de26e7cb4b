"""Granite 3.0 (Granite Team 2024), the dense models.

| variant | parameters    | paper's | tokens | FLOPs  | expected |
|---------|---------------|---------|--------|--------|----------|
| 3-2b    | 2,533,531,648 | 2.5B    | 12T    | 1.8e23 |          |
| 3-8b    | 8,170,848,256 | 8.1B    | 12T    | 5.7e23 |          |

Sizes and multipliers are those of the released configurations. The report trains in two stages, 10T
and 2T tokens, with muP and the power schedule (Shen et al. 2024, arXiv 2408.13359), whose constants
and batch size were not checked. The recipe here is Llama 2's in one stage, with 3e-4. Scores were
not checked either, so none are listed.

A Llama with tied embeddings multiplied by 12, sublayer outputs multiplied by 0.22, attention logits
scaled by 1 / head_dim instead of its square root, and output logits divided by 8 or 16.

    lm train --config experiments/granite.py:3-2b --workdir runs/granite \
        --config.parallel.preset=fsdp --config.data.source=jsonl:DIR/*.jsonl.gz \
        --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default, fill
from lm.recipes import llama_block, llama_training

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads model.n_kv_heads model.d_ff "
    "model.vocab_size model.attention_scale model.logits_scaling"
)
VARIANTS = {
    "3-2b": ("granite-3.0-2b", 40, 2048, 32, 8, 8192, 49_155, 1 / 64, 8.0),
    "3-8b": ("granite-3.0-8b", 40, 4096, 32, 8, 12800, 49_155, 1 / 128, 16.0),
}


def get_config(variant="3-2b"):
    config = default()
    model = config.model
    llama_block(config)
    fill(config, COLUMNS, choose(VARIANTS, variant))
    model.tie_embeddings = True
    model.embedding_multiplier, model.residual_multiplier = 12.0, 0.22
    config.data.sequence_length, config.optimizer.learning_rate = 4096, 3e-4
    llama_training(config, tokens=12e12)
    config.data.tokenizer = "tokenizers:granite.json"
    return config
