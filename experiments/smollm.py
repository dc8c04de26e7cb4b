"""SmolLM2 (Allal et al. 2025, arXiv 2502.02737) and SmolLM3 (Hugging Face 2025).

| variant | parameters    | paper's | tokens | FLOPs  | expected   |
|---------|---------------|---------|--------|--------|------------|
| 2-135m  | 134,515,008   | 135M    | 2T     | 1.3e21 |            |
| 2-360m  | 361,821,120   | 362M    | 4T     | 7.6e21 |            |
| 2-1.7b  | 1,711,376,384 | 1.7B    | 11T    | 1.1e23 |            |
| 3-3b    | 3,075,098,624 | 3B      | 11.2T  | 1.9e23 |            |
| tiny    |               |         |        |        | for trials |

Sizes are those of the released configurations. Learning rates, batch sizes, token counts and the
final decay to 0, over the last tenth (SmolLM3, 2-1.7b) or fifth of the steps, are from memory of
the report and the blog. Neither they nor the scores were checked, so no scores are listed.

SmolLM2 is a Llama with tied embeddings. SmolLM3 has no positions in every fourth layer (NoPE, Yang
et al. 2025, arXiv 2501.18795). It was trained on rows of 4,096 tokens with RoPE base 50,000; later
stages raised the base to 5,000,000 for 65,536 tokens, which is the one used here.

    lm train --config experiments/smollm.py:2-135m --workdir runs/smollm \
        --config.parallel.preset=fsdp --config.data.source=jsonl:DIR/*.jsonl.gz \
        --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default, fill
from lm.recipes import llama_block, llama_training, trial

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads model.n_kv_heads model.d_ff "
    "model.vocab_size model.rope_theta data.sequence_length optimizer.learning_rate"
)
VARIANTS = {  # values of COLUMNS, training tokens, tokens per step
    "tiny": (("", 4, 128, 4, 2, 352, 0, 1e4, 256, 3e-3), 0, 0),
    "2-135m": (("smollm2-135m", 30, 576, 9, 3, 1536, 49_152, 1e5, 2048, 3e-3), 2e12, 2**20),
    "2-360m": (("smollm2-360m", 32, 960, 15, 5, 2560, 49_152, 1e5, 2048, 3e-3), 4e12, 2**20),
    "2-1.7b": (("smollm2-1.7b", 24, 2048, 32, 32, 8192, 49_152, 1.3e5, 2048, 5e-4), 11e12, 2**21),
    "3-3b": (
        ("smollm3-3b", 36, 2048, 16, 4, 11008, 128_256, 5e6, 4096, 2e-4),
        11.2e12,
        576 * 4096,
    ),
}


def get_config(variant="2-135m"):
    row, tokens, batch_tokens = choose(VARIANTS, variant)
    config = default()
    model = config.model
    llama_block(config)
    fill(config, COLUMNS, row)
    model.tie_embeddings = True
    if not variant.startswith("2"):
        model.nope_every = 4
    if variant == "tiny":
        trial(config)
        return config

    model.max_length = 8192 if variant.startswith("2") else 65_536
    if variant == "3-3b":
        model.norm_eps = 1e-6
    llama_training(config, tokens, batch_tokens)
    config.schedule.name, config.schedule.final_ratio = "wsd", 0.0
    config.schedule.wsd_decay_fraction = 0.1 if variant in ("2-1.7b", "3-3b") else 0.2
    config.data.tokenizer = "tokenizers:smollm.json"
    return config
