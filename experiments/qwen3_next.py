"""Qwen3-Next (Qwen team, September 2025): a hybrid of Gated DeltaNet and gated attention.

| variant | parameters     | active        | paper's | tokens | FLOPs  | expected   |
|---------|----------------|---------------|---------|--------|--------|------------|
| 80b-a3b | 79,674,391,296 | 3,874,929,408 | 80B, 3B | 15T    | 2.9e23 |            |
| tiny    |                |               |         |        |        | for trials |

Sizes are those of the released configuration, without its module that predicts a further token.
Learning rate and batch size are not published, so they are Llama 2's: 4M tokens per step, 3e-4.
Scores were not checked, so none are listed.

Every fourth layer is attention, with 2 key heads, RoPE on a quarter of each head, normalized
queries and keys, and a sigmoid gate of the outputs. The others are Gated DeltaNets (Yang et al.
2024, arXiv 2412.06464), whose state per head is a matrix of 128 × 128 instead of a cache that grows
with the text: 32 heads of values, two for each of 16 heads of keys. Each token uses 10 of 512
experts, with weights normalized to 1, and a shared one gated by a sigmoid. Norms multiply by
1 + scale. The balance loss is that of `qwen_moe.py`.

    lm train --config experiments/qwen3_next.py:80b-a3b --workdir runs/next \\
        --config.parallel.mesh.data=1 --config.parallel.mesh.fsdp=-1 \\
        --config.parallel.mesh.expert=8 --config.data.source=jsonl:DIR/*.jsonl.gz \\
        --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default, fill
from lm.recipes import llama_block, llama_training, trial

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads model.head_dim model.d_ff model.vocab_size "
    "model.n_experts model.experts_per_token model.expert_d_ff model.shared_expert_d_ff "
    "model.ssm_heads model.ssm_groups model.ssm_head_dim model.ssm_state "
    "optimizer.learning_rate"
)
VARIANTS = {  # values of COLUMNS
    "80b-a3b": (
        *("qwen3-next-80b-a3b", 48, 2048, 16, 256, 5120, 151_936, 512, 10, 512, 512),
        *(32, 16, 128, 128, 3e-4),
    ),
    "tiny": ("", 4, 128, 4, 32, 352, 0, 8, 2, 88, 88, 4, 2, 32, 32, 3e-3),
}


def get_config(variant="80b-a3b"):
    row = choose(VARIANTS, variant)
    config = default()
    model = config.model
    llama_block(config)
    fill(config, COLUMNS, row)
    model.mixer, model.ssm_conv_bias = "gated_delta", False
    model.attention_layers = tuple(range(3, model.n_layers, 4))
    model.n_kv_heads, model.rope_fraction, model.rope_theta = 2, 0.25, 1e7
    model.qk_norm = model.attention_gate = model.norm_unit_offset = True
    model.norm_eps, model.expert_weights, model.shared_expert_gate = 1e-6, "normalized", True
    model.balance_loss = 0.001 * model.experts_per_token / model.n_layers
    if variant == "tiny":
        trial(config)
        return config
    model.max_length, config.data.sequence_length = 262_144, 4096
    llama_training(config, 15e12)
    config.data.tokenizer = "tokenizers:qwen.json"
    return config
