"""Mixtures of experts of Qwen2 (Yang et al. 2024, Table 1) and Qwen3 (Yang et al. 2025, Table 2).

| variant     | parameters      | active         | paper's | tokens | FLOPs  | expected |
|-------------|-----------------|----------------|---------|--------|--------|----------|
| 2-57b-a14b  | 57,408,658,944  | 14,249,270,784 | 57.4B   | 4.5T   | 3.6e23 |          |
| 3-30b-a3b   | 30,532,122,624  | 3,353,032,704  | 30.5B   | 36T    | 5.9e23 |          |
| 3-235b-a22b | 235,093,634,560 | 22,190,763,520 | 235B    | 36T    | 4.5e24 |          |

Sizes and token counts are those of the reports and released configurations. Learning rates and
batch sizes are not published, so they are Llama 2's: 4M tokens per step, 3e-4. 2-57b-a14b was
upcycled from the 7B's parameters and trained on 4.5T more tokens; here it is trained on these from
scratch. Scores were not checked, so none are listed.

Qwen's blocks (`qwen.py`) with experts as feed-forward layers. In 2-57b-a14b each token uses 8 of
64, weighted by their probabilities among all, and a shared expert gated by a sigmoid of the token.
In Qwen3 each token uses 8 of 128, with weights normalized to 1, and no shared expert. The balance
loss is that of the released configurations, 0.001, which counts all choices and averages over
layers; here loads sum to 1 and layers are summed, so it is 0.001 · 8 / layers each.

    lm train --config experiments/qwen_moe.py:3-30b-a3b --workdir runs/qwen \\
        --config.parallel.mesh.data=1 --config.parallel.mesh.fsdp=-1 \\
        --config.parallel.mesh.expert=8 --config.data.source=jsonl:DIR/*.jsonl.gz \\
        --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default, fill
from lm.recipes import llama_block, llama_training

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads model.n_kv_heads model.d_ff "
    "model.n_experts model.expert_d_ff model.shared_expert_d_ff"
)
VARIANTS = {  # values of COLUMNS, training tokens
    "2-57b-a14b": (("qwen2-57b-a14b", 28, 3584, 28, 4, 18944, 64, 2560, 20480), 4.5e12),
    "3-30b-a3b": (("qwen3-30b-a3b", 48, 2048, 32, 4, 6144, 128, 768, 0), 36e12),
    "3-235b-a22b": (("qwen3-235b-a22b", 94, 4096, 64, 4, 12288, 128, 1536, 0), 36e12),
}


def get_config(variant="3-30b-a3b"):
    row, tokens = choose(VARIANTS, variant)
    config = default()
    model = config.model
    llama_block(config)
    fill(config, COLUMNS, row)
    model.vocab_size, model.head_dim, model.experts_per_token = 151_936, 128, 8
    model.norm_eps, model.rope_theta = 1e-6, 1e6
    model.balance_loss = 0.001 * model.experts_per_token / model.n_layers
    if variant.startswith("3"):
        model.qk_norm, model.expert_weights = True, "normalized"
    else:
        model.attention_bias, model.expert_weights = "qkv", "probability"
        model.shared_expert_gate = True
    model.max_length, config.data.sequence_length = 32_768, 4096
    config.optimizer.learning_rate = 3e-4
    llama_training(config, tokens)
    config.data.tokenizer = "tokenizers:qwen.json"
    return config
