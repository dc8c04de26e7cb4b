"""StableLM 3B-4E1T (Tow et al. 2023) and Stable LM 2 1.6B (Bellagente et al. 2024).

| variant | parameters    | paper's | tokens | FLOPs  | expected |
|---------|---------------|---------|--------|--------|----------|
| 3b      | 2,795,443,200 | 2.8B    | 4T     | 6.1e22 |          |
| 2-1.6b  | 1,644,515,328 | 1.6B    | 2T     | 1.5e22 |          |

Sizes are those of the released configurations. 3b makes four passes over 1T tokens. Batches of 4M
tokens and 3b's cosine from 3.2e-4 to 4 % are the model card's, from memory. 2-1.6b uses the same
schedule from 1e-3; the report joins a cosine, an inverse square root and a linear decay to 0.
Scores were not checked, so none are listed.

A Llama with LayerNorm, in which RoPE rotates the first quarter of each head; 2-1.6b has biases on
queries, keys and values.

    lm train --config experiments/stablelm.py:2-1.6b --workdir runs/stablelm \
        --config.parallel.preset=fsdp --config.data.source=jsonl:DIR/*.jsonl.gz \
        --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default, fill
from lm.recipes import llama_block, llama_training

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads model.d_ff model.vocab_size "
    "optimizer.learning_rate"
)
VARIANTS = {  # values of COLUMNS, training tokens
    "3b": (("stablelm-3b-4e1t", 32, 2560, 32, 6912, 50_304, 3.2e-4), 4e12),
    "2-1.6b": (("stablelm-2-1.6b", 24, 2048, 32, 5632, 100_352, 1e-3), 2e12),
}


def get_config(variant="2-1.6b"):
    row, tokens = choose(VARIANTS, variant)
    config = default()
    model = config.model
    llama_block(config)
    fill(config, COLUMNS, row)
    model.norm, model.norm_bias, model.rope_fraction = "layernorm", True, 0.25
    model.attention_bias = "qkv" if variant == "2-1.6b" else "none"
    config.data.sequence_length = 4096
    llama_training(config, tokens)
    config.schedule.warmup_steps, config.schedule.final_ratio = 4800, 0.04
    config.data.tokenizer = "tokenizers:stablelm.json"
    return config
