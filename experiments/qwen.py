"""Qwen2 and 2.5 (Yang et al. 2024, Table 1) and Qwen3 (Yang et al. 2025, Table 1).

| variant | parameters    | paper's | tokens | FLOPs  | expected |
|---------|---------------|---------|--------|--------|----------|
| 2-0.5b  | 494,032,768   | 0.5B    | 12T    | 2.6e22 |          |
| 2-1.5b  | 1,543,714,304 | 1.5B    | 7T     | 5.5e22 |          |
| 2-7b    | 7,615,616,512 | 7B      | 7T     | 2.7e23 |          |
| 2.5-3b  | 3,085,938,688 | 3B      | 18T    | 3.0e23 |          |
| 3-0.6b  | 596,049,920   | 0.6B    | 36T    | 9.5e22 |          |
| 3-1.7b  | 1,720,574,976 | 1.7B    | 36T    | 3.0e23 |          |
| 3-4b    | 4,022,468,096 | 4B      | 36T    | 7.8e23 |          |
| 3-8b    | 8,190,735,360 | 8B      | 36T    | 1.5e24 |          |

Sizes and token counts are those of the reports and released configurations. Learning rates and
batch sizes are not published, so they are Llama 2's: 4M tokens per step, 3e-4. Scores were not
checked, so none are listed.

Llama's block. Qwen2 has biases on queries, keys and values; Qwen3 has none and normalizes queries
and keys per head, with head dim 128 whatever d_model is. The token embeddings are padded: 151,936
rows for 151,669 tokens (7B: 152,064). Rows have 4,096 tokens, as in the first and longest of
Qwen3's stages; later ones use 32,768.

    lm train --config experiments/qwen.py:3-0.6b --workdir runs/qwen --config.parallel.preset=fsdp \
        --config.data.source=jsonl:DIR/*.jsonl.gz --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default, fill
from lm.recipes import llama_block, llama_training

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads model.n_kv_heads model.head_dim "
    "model.d_ff model.vocab_size model.tie_embeddings"
)
VARIANTS = {  # values of COLUMNS, training tokens
    "2-0.5b": (("qwen2-0.5b", 24, 896, 14, 2, 64, 4864, 151_936, True), 12e12),
    "2-1.5b": (("qwen2-1.5b", 28, 1536, 12, 2, 128, 8960, 151_936, True), 7e12),
    "2-7b": (("qwen2-7b", 28, 3584, 28, 4, 128, 18944, 152_064, False), 7e12),
    "2.5-3b": (("qwen2.5-3b", 36, 2048, 16, 2, 128, 11008, 151_936, True), 18e12),
    "3-0.6b": (("qwen3-0.6b", 28, 1024, 16, 8, 128, 3072, 151_936, True), 36e12),
    "3-1.7b": (("qwen3-1.7b", 28, 2048, 16, 8, 128, 6144, 151_936, True), 36e12),
    "3-4b": (("qwen3-4b", 36, 2560, 32, 8, 128, 9728, 151_936, True), 36e12),
    "3-8b": (("qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151_936, False), 36e12),
}


def get_config(variant="3-0.6b"):
    row, tokens = choose(VARIANTS, variant)
    config = default()
    model = config.model
    llama_block(config)
    fill(config, COLUMNS, row)
    model.norm_eps, model.rope_theta = 1e-6, 1e6
    if variant.startswith("3"):
        model.qk_norm = True
    else:
        model.attention_bias = "qkv"
    model.max_length, config.data.sequence_length = 32_768, 4096
    config.optimizer.learning_rate = 3e-4
    llama_training(config, tokens)
    config.data.tokenizer = "tokenizers:qwen.json"
    return config
