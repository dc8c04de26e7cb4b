"""Mistral 7B v0.1 (Jiang et al. 2023, Table 1).

| variant | parameters    | paper's | tokens | FLOPs  | expected  |
|---------|---------------|---------|--------|--------|-----------|
| 7b      | 7,241,732,096 | 7B      | 2T *   | 8.4e22 | MMLU 62.5 |

MMLU is 5-shot, from Mixtral's Table 2. * Data and recipe are not published: these are Llama 2's.
Llama 2's block with eight key/value heads and a sliding window of 4,096 tokens, the current one
included, in every layer; trained on rows of 8,192, the paper's context length.

    lm train --config experiments/mistral.py:7b --workdir runs/mistral \
        --config.parallel.preset=fsdp --config.data.source=jsonl:DIR/*.jsonl.gz \
        --config.data.tokenizer=sentencepiece:FILE.model
"""

from lm.config import choose, default
from lm.recipes import llama_block, llama_training

VARIANTS = {"7b": "mistral-7b-v0.1"}  # paper entry


def get_config(variant="7b"):
    config = default()
    config.paper = choose(VARIANTS, variant)
    llama_block(config)
    model = config.model
    model.n_layers, model.d_model, model.n_heads, model.n_kv_heads = 32, 4096, 32, 8
    model.d_ff, model.vocab_size, model.norm_eps = 14336, 32000, 1e-5
    model.window = 4096
    config.data.sequence_length = 8192
    config.optimizer.learning_rate = 3e-4
    llama_training(config, tokens=2e12)
    return config
