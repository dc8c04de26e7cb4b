"""T5 (Raffel et al. 2020, §3.1 and §3.7) and T5 1.1 (gated feed-forward layers, Shazeer 2020).

| variant   | parameters     | paper's | tokens | FLOPs  | expected                             |
|-----------|----------------|---------|--------|--------|--------------------------------------|
| small     | 60,506,624     | 60M     | 1.28T  | 1.7e20 | GLUE 77.4, SQuAD F1 87.24, EnDe 26.7 |
| base      | 222,903,552    | 220M    | 1.28T  | 7.6e20 | GLUE 82.7, SQuAD F1 92.08, EnDe 30.9 |
| large     | 737,668,096    | 770M    | 1.28T  | 2.7e21 | GLUE 86.4, SQuAD F1 93.79, EnDe 32.0 |
| 1.1-small | 76,961,152     | 77M     | 1.28T  | 1.7e20 | SQuAD F1 86.63                       |
| 1.1-base  | 247,577,856    | 250M    | 1.28T  | 7.6e20 |                                      |
| 1.1-large | 783,150,080    | 800M    | 1.28T  | 2.8e21 | SQuAD F1 93.21                       |
| 1.1-xl    | 2,849,757,184  | 3B      | 1.28T  | 1.0e22 |                                      |
| 1.1-xxl   | 11,135,332,352 | 11B     | 1.28T  | 4.2e22 |                                      |

Scores after fine-tuning (Table 14; 1.1: NVIDIA's reproduction on the Pile). T5 1.0 was pretrained
on a mixture of tasks and C4; this is its unsupervised part, the only one that 1.1 is trained on.

RMSNorm before each sublayer, no biases, head dim 64, unscaled attention logits, 32 relative
position buckets shared by all layers of a stack. 1.0: ReLU, output tied to the embeddings divided
by √d. 1.1: gated tanh-GELU, untied output, no dropout in pretraining. Spans of 3 tokens, 15 % of
568, make 512 + 114 tokens. Adafactor, lr 1/√max(t, 10⁴) times the parameter's root mean square, no
weight decay, no clipping, z-loss 1e-4; 2,048 sequences, 1,000,000 updates. Different from the
released code: Adafactor does not factor the attention kernels, whose head dim is below its minimum
of 128.

    lm train --config experiments/t5.py:1.1-small --workdir runs/t5 --config.parallel.preset=data \
        --config.data.source=jsonl:DIR/*.jsonl.gz --config.data.tokenizer=sentencepiece:FILE.model
"""

from lm.config import choose, default
from lm.recipes import t5_block, t5_training

VARIANTS = {  # paper entry, layers per stack, d_model, heads, d_ff
    "small": ("t5-v1.0-small", 6, 512, 8, 2048),
    "base": ("t5-v1.0-base", 12, 768, 12, 3072),
    "large": ("t5-v1.0-large", 24, 1024, 16, 4096),
    "1.1-small": ("t5-v1.1-small", 8, 512, 6, 1024),
    "1.1-base": ("t5-v1.1-base", 12, 768, 12, 2048),
    "1.1-large": ("t5-v1.1-large", 24, 1024, 16, 2816),
    "1.1-xl": ("t5-v1.1-xl", 24, 2048, 32, 5120),
    "1.1-xxl": ("t5-v1.1-xxl", 24, 4096, 64, 10_240),
}


def get_config(variant="1.1-small"):
    config = default()
    model, data = config.model, config.data
    t5_block(config)
    config.paper, model.n_layers, model.d_model, model.n_heads, model.d_ff = choose(
        VARIANTS, variant
    )
    model.vocab_size = 32_128  # 32,000 pieces, 100 sentinels, padded
    if not variant.startswith("1.1"):
        model.activation, model.tie_embeddings, model.scale_logits = "relu", True, True
        model.dropout = model.attention_dropout = model.activation_dropout = 0.1
    t5_training(config)
    data.sequence_length, data.batch_size = 512, 2048
    return config
