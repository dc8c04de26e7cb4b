"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, Table 10) and Bamba (IBM, Princeton, UIUC 2024).

| variant  | parameters    | paper's | tokens | FLOPs  | expected |
|----------|---------------|---------|--------|--------|----------|
| 130m     | 128,989,632   | 130M    | 300B   | 1.6e20 |          |
| 370m     | 368,346,624   | 370M    | 300B   | 5.7e20 |          |
| 780m     | 780,161,280   | 780M    | 300B   | 1.3e21 |          |
| 1.3b     | 1,343,757,312 | 1.3B    | 300B   | 2.2e21 |          |
| 2.7b     | 2,702,599,680 | 2.7B    | 300B   | 4.6e21 |          |
| bamba-9b | 9,780,235,392 | 9.8B    | 2.2T   | 1.2e23 |          |

Sizes are those of the released configurations. Learning rates, batch sizes and token counts are
from memory of the papers and were not checked, so no scores are listed; the schedule is Llama 2's.

A Mamba-2 block is RMSNorm and the mixer: heads of 64 channels with a state of 128 each, together
twice as wide as d_model; no attention, feed-forward layer or positions. Bamba adds SwiGLU after
each mixer, and layers 9, 18 and 27 are attention, with RoPE on half of each head.

    lm train --config experiments/mamba.py:130m --workdir runs/mamba --config.parallel.preset=fsdp \
        --config.data.source=jsonl:DIR/*.jsonl.gz --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default, fill
from lm.recipes import llama_block, llama_training

COLUMNS = "paper model.n_layers model.d_model model.ssm_heads model.vocab_size"
COLUMNS += " data.sequence_length optimizer.learning_rate"
VARIANTS = {  # values of COLUMNS, training tokens, tokens per step
    "130m": (("mamba2-130m", 24, 768, 24, 50_288, 2048, 3e-3), 3e11, 2**19),
    "370m": (("mamba2-370m", 48, 1024, 32, 50_288, 2048, 1.5e-3), 3e11, 2**19),
    "780m": (("mamba2-780m", 48, 1536, 48, 50_288, 2048, 1.25e-3), 3e11, 2**19),
    "1.3b": (("mamba2-1.3b", 48, 2048, 64, 50_288, 2048, 1e-3), 3e11, 2**19),
    "2.7b": (("mamba2-2.7b", 64, 2560, 80, 50_288, 2048, 8e-4), 3e11, 2**20),
    "bamba-9b": (("bamba-9b", 32, 4096, 128, 128_256, 4096, 3e-4), 2.2e12, 2**21),
}


def get_config(variant="130m"):
    row, tokens, batch_tokens = choose(VARIANTS, variant)
    config = default()
    model = config.model
    llama_block(config)
    fill(config, COLUMNS, row)
    model.mixer, model.ssm_chunk = "mamba2", 256
    if variant == "bamba-9b":
        model.attention_layers, model.rope_fraction = (9, 18, 27), 0.5
        model.n_heads, model.n_kv_heads, model.d_ff = 32, 8, 14_336
    else:
        model.positions, model.feed_forward, model.tie_embeddings = "none", False, True
    llama_training(config, tokens, batch_tokens)
    config.data.tokenizer = "tokenizers:tokenizer.json"
    return config
