"""mT5 (Xue et al. 2021, Table 1): T5 1.1 with 250,112 pieces, on text in 101 languages.

| variant | parameters     | paper's | tokens | FLOPs  | expected  |
|---------|----------------|---------|--------|--------|-----------|
| small   | 300,176,768    | 300M    | 1.28T  | 1.7e20 | XNLI 67.5 |
| base    | 582,401,280    | 580M    | 1.28T  | 7.6e20 | XNLI 75.4 |
| large   | 1,229,581,312  | 1.2B    | 1.28T  | 2.8e21 | XNLI 81.1 |
| xl      | 3,742,619,648  | 3.7B    | 1.28T  | 1.0e22 | XNLI 82.9 |
| xxl     | 12,921,057,280 | 13B     | 1.28T  | 4.2e22 | XNLI 85.0 |

Zero-shot accuracy after fine-tuning on English only (Table 2), from memory, not checked against the
paper. Sizes are those of the released configurations. transformers ties the output matrix, unlike
the released files, so its count is lower by that matrix.

Spans of 3 tokens, 15 % of the text, sources of 1,024 tokens; Adafactor, lr 1/√max(t, 10⁴), no
dropout; 1,024 sequences, 1,000,000 updates. Languages are sampled with their share to the power
0.3: name the corpora in data.source and the shares in data.weights.

    lm train --config experiments/mt5.py:small --workdir runs/mt5 --config.parallel.preset=data \
        --config.data.source=jsonl:DIR/*.jsonl.gz --config.data.tokenizer=sentencepiece:FILE.model
"""

from lm.config import choose, default
from lm.recipes import t5_block, t5_training

VARIANTS = {  # paper entry, layers per stack, d_model, heads, d_ff
    "small": ("mt5-small", 8, 512, 6, 1024),
    "base": ("mt5-base", 12, 768, 12, 2048),
    "large": ("mt5-large", 24, 1024, 16, 2816),
    "xl": ("mt5-xl", 24, 2048, 32, 5120),
    "xxl": ("mt5-xxl", 24, 4096, 64, 10_240),
}


def get_config(variant="small"):
    config = default()
    model, data = config.model, config.data
    t5_block(config)
    config.paper, model.n_layers, model.d_model, model.n_heads, model.d_ff = choose(
        VARIANTS, variant
    )
    model.vocab_size = 250_112  # 250,000 pieces, 100 sentinels, padded
    t5_training(config)
    data.source, data.tokenizer = "jsonl:mc4/*.jsonl.gz", "sentencepiece:mt5.model"
    data.sequence_length, data.batch_size = 1024, 1024
    config.train.loss_chunk = 64  # otherwise the logits would be the largest arrays
    return config
