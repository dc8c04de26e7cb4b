"""Mixtral 8×7B (Jiang et al. 2024, Table 1) and 8×22B (Mistral AI 2024, released configuration).

| variant | parameters      | active         | paper's | tokens | FLOPs  | expected   |
|---------|-----------------|----------------|---------|--------|--------|------------|
| 8x7b    | 46,702,792,704  | 12,879,925,248 | 47B     | 2T *   | 1.5e23 | MMLU 70.6  |
| 8x22b   | 140,620,634,112 | 39,152,031,744 | 141B    | 2T *   | 4.7e23 |            |
| tiny    |                 |                |         |        |        | for trials |

MMLU is 5-shot (Table 2). * Data and recipe are not published: these are Llama 2's.

A Llama whose feed-forward layers are eight experts. Each token uses two, weighted by the softmax
over their two logits, and none are dropped. The balance loss is that of the released configuration,
0.02, which counts both choices and averages over layers; here loads sum to 1 and layers are summed,
so it is 0.02 · 2 / layers each.

    lm train --config experiments/mixtral.py:8x7b --workdir runs/mixtral \\
        --config.parallel.mesh.data=1 --config.parallel.mesh.fsdp=-1 \\
        --config.parallel.mesh.expert=8 --config.data.source=jsonl:DIR/*.jsonl.gz \\
        --config.data.tokenizer=sentencepiece:FILE.model
"""

from lm.config import choose, default, fill
from lm.recipes import llama_block, llama_training, trial

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads model.n_kv_heads model.d_ff "
    "model.vocab_size data.sequence_length optimizer.learning_rate"
)
VARIANTS = {
    "tiny": ("", 4, 128, 4, 2, 176, 0, 256, 3e-3),
    "8x7b": ("mixtral-8x7b", 32, 4096, 32, 8, 14336, 32000, 32768, 3e-4),
    "8x22b": ("mixtral-8x22b", 56, 6144, 48, 8, 16384, 32000, 65536, 1.5e-4),
}


def get_config(variant="8x7b"):
    config = default()
    model = config.model
    llama_block(config)
    fill(config, COLUMNS, choose(VARIANTS, variant))
    model.n_experts, model.experts_per_token = 8, 2
    model.balance_loss = 0.02 * model.experts_per_token / model.n_layers
    if variant == "tiny":
        trial(config)
        return config

    model.rope_theta = 1e6
    llama_training(config, tokens=2e12)
    return config
