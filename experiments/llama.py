"""Llama 1, 2, 3 (Touvron et al. 2023a, Table 2; 2023b, Table 1; Grattafiori et al. 2024, Table 3).

| variant  | parameters      | paper's | tokens | FLOPs  | expected              |
|----------|-----------------|---------|--------|--------|-----------------------|
| 1-7b     | 6,738,415,616   | 6.7B    | 1T     | 3.9e22 | MMLU 35.1             |
| 1-13b    | 13,015,864,320  | 13.0B   | 1T     | 7.6e22 | MMLU 46.9             |
| 1-33b    | 32,528,943,616  | 32.5B   | 1.4T   | 2.7e23 | MMLU 57.8             |
| 1-65b    | 65,285,660,672  | 65.2B   | 1.4T   | 5.4e23 | MMLU 63.4             |
| 2-7b     | 6,738,415,616   | 7B      | 2T     | 7.8e22 | MMLU 45.3             |
| 2-13b    | 13,015,864,320  | 13B     | 2T     | 1.5e23 | MMLU 54.8             |
| 2-70b    | 68,976,648,192  | 70B     | 2T     | 8.2e23 | MMLU 68.9             |
| 3-8b     | 8,030,261,248   | 8B      | 15T    | 6.3e23 | MMLU 66.6             |
| 3-70b    | 70,553,706,496  | 70B     | 15T    | 6.2e24 | MMLU 79.5             |
| 3.1-405b | 405,853,388,800 | 405B    | 15.6T  | 3.8e25 |                       |
| 3.2-1b   | 1,235,814,400   | 1B      | 9T     | 5.3e22 |                       |
| 3.2-3b   | 3,212,749,824   | 3B      | 9T     | 1.5e23 |                       |
| tiny     |                 |         |        |        | for trying things out |

MMLU is 5-shot (Llama 2, Table 3; Llama 3's model card). Learning rates are the papers': 3e-4 for
the smaller, 1.5e-4 for the larger models, 8e-5 for 405B. Llama 1 and 2: AdamW (0.9, 0.95; Llama 2
with eps 1e-5), weight decay 0.1, clipping at 1, a cosine to 10 % after 2,000 warmup steps, 4M
tokens per step.

Llama 3 publishes only the recipe of 405B: 8,000 warmup steps, a cosine to 1 % over 1,200,000 steps,
and a batch that grows from 4M to 16M tokens. Here all 930,000 steps have 16M. 8B and 70B use Llama
2's schedule over the 15T tokens of the model card. The 3.2 models were pruned from 3.1 8B and
distilled from larger models, on up to 9T tokens; here they are trained from scratch. The released
3.1 and 3.2 scale RoPE for contexts beyond 8,192 tokens; here all are trained at 8,192, which does
not need it. Llama 3's paper gives a vocabulary of 128,000; the release has 128,256 rows.

    lm train --config experiments/llama.py:2-7b --workdir runs/llama --config.parallel.preset=fsdp \
        --config.data.source=jsonl:DIR/*.jsonl.gz --config.data.tokenizer=sentencepiece:FILE.model
"""

from lm.config import choose, default, fill
from lm.recipes import llama_block, llama_training, trial

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads model.n_kv_heads model.d_ff "
    "model.vocab_size data.sequence_length model.tie_embeddings optimizer.learning_rate"
)
VARIANTS = {  # values of COLUMNS, training tokens
    "tiny": (("", 4, 128, 4, 2, 352, 0, 256, False, 3e-3), 0),
    "1-7b": (("llama-1-7b", 32, 4096, 32, 32, 11008, 32000, 2048, False, 3e-4), 1e12),
    "1-13b": (("llama-1-13b", 40, 5120, 40, 40, 13824, 32000, 2048, False, 3e-4), 1e12),
    "1-33b": (("llama-1-33b", 60, 6656, 52, 52, 17920, 32000, 2048, False, 1.5e-4), 1.4e12),
    "1-65b": (("llama-1-65b", 80, 8192, 64, 64, 22016, 32000, 2048, False, 1.5e-4), 1.4e12),
    "2-7b": (("llama-2-7b", 32, 4096, 32, 32, 11008, 32000, 4096, False, 3e-4), 2e12),
    "2-13b": (("llama-2-13b", 40, 5120, 40, 40, 13824, 32000, 4096, False, 3e-4), 2e12),
    "2-70b": (("llama-2-70b", 80, 8192, 64, 8, 28672, 32000, 4096, False, 1.5e-4), 2e12),
    "3-8b": (("llama-3-8b", 32, 4096, 32, 8, 14336, 128256, 8192, False, 3e-4), 15e12),
    "3-70b": (("llama-3-70b", 80, 8192, 64, 8, 28672, 128256, 8192, False, 1.5e-4), 15e12),
    "3.1-405b": (
        ("llama-3.1-405b", 126, 16384, 128, 8, 53248, 128256, 8192, False, 8e-5),
        15.6e12,
    ),
    "3.2-1b": (("llama-3.2-1b", 16, 2048, 32, 8, 8192, 128256, 8192, True, 3e-4), 9e12),
    "3.2-3b": (("llama-3.2-3b", 28, 3072, 24, 8, 8192, 128256, 8192, True, 3e-4), 9e12),
}


def get_config(variant="2-7b"):
    row, tokens = choose(VARIANTS, variant)
    config = default()
    model = config.model
    llama_block(config)
    fill(config, COLUMNS, row)
    if variant == "tiny":
        trial(config)
        return config

    generation = variant[0]
    model.norm_eps = 1e-6 if generation == "1" else 1e-5
    model.rope_theta = 5e5 if generation == "3" else 1e4
    llama_training(config, tokens, 2**24 if variant == "3.1-405b" else 2**22)
    if generation == "2":
        config.optimizer.adamw.eps = 1e-5
    if variant == "3.1-405b":
        config.schedule.warmup_steps, config.schedule.final_ratio = 8000, 0.01
    return config
