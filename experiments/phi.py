"""Phi-3-mini, Phi-4 and Phi-4-mini (Abdin et al. 2024a, 2024b; Microsoft 2025).

| variant | parameters     | paper's | tokens | FLOPs  | expected |
|---------|----------------|---------|--------|--------|----------|
| 3-mini  | 3,821,079,552  | 3.8B    | 3.3T   | 7.2e22 |          |
| 4       | 14,659,507,200 | 14B     | 10T    | 8.2e23 |          |
| 4-mini  | 3,836,021,760  | 3.8B    | 5T     | 9.7e22 |          |

Sizes are those of the released configurations, token counts the reports'; the data are filtered and
synthetic, and not published. Learning rates and batch sizes are Llama 2's, except Phi-4's: 3e-4,
5,760 rows of 4,096 tokens (from memory of the report). Scores were not checked, so none are listed.

A Llama whose checkpoints fuse queries, keys and values into one tensor, and gate and input into
another. 3-mini has a sliding window of 2,047 tokens; 4-mini rotates three quarters of each head and
ties its embeddings. The longer contexts (LongRoPE) use factors that differ between models, which lm
import reads.

    lm train --config experiments/phi.py:3-mini --workdir runs/phi --config.parallel.preset=fsdp \
        --config.data.source=jsonl:DIR/*.jsonl.gz --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default, fill
from lm.recipes import llama_block, llama_training

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads model.n_kv_heads model.d_ff "
    "model.vocab_size model.rope_theta model.window"
)
VARIANTS = {  # values of COLUMNS, training tokens, tokens per step
    "3-mini": (("phi-3-mini", 32, 3072, 32, 32, 8192, 32_064, 1e4, 2047), 3.3e12, 2**22),
    "4": (("phi-4", 40, 5120, 40, 10, 17920, 100_352, 2.5e5, 0), 10e12, 5760 * 4096),
    "4-mini": (("phi-4-mini", 32, 3072, 24, 8, 8192, 200_064, 1e4, 0), 5e12, 2**22),
}


def get_config(variant="3-mini"):
    row, tokens, batch_tokens = choose(VARIANTS, variant)
    config = default()
    model = config.model
    llama_block(config)
    fill(config, COLUMNS, row)
    if variant == "4-mini":
        model.rope_fraction, model.tie_embeddings = 0.75, True
    if variant == "4":
        model.max_length = 16_384
    config.data.sequence_length, config.optimizer.learning_rate = 4096, 3e-4
    llama_training(config, tokens, batch_tokens)
    config.data.tokenizer = "tokenizers:phi.json"
    return config
