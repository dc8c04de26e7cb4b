"""FLAN-T5 (Chung et al. 2022, §2): T5 1.1 fine-tuned on instructions for 1,836 tasks.

| variant | parameters     | paper's | tokens | FLOPs  | expected  |
|---------|----------------|---------|--------|--------|-----------|
| small   | 76,961,152     | 80M     | 8.03B  | 1.1e18 | MMLU 28.7 |
| base    | 247,577,856    | 250M    | 6.88B  | 4.1e18 | MMLU 35.9 |
| large   | 783,150,080    | 780M    | 5.24B  | 1.1e19 | MMLU 45.1 |
| xl      | 2,849,757,184  | 3B      | 3.11B  | 2.5e19 | MMLU 52.4 |
| xxl     | 11,135,332,352 | 11B     | 1.15B  | 3.7e19 | MMLU 55.1 |

Direct prompting with five examples (Table 5). Scores and recipe are from memory, not checked
against the paper.

The model is T5 1.1 (`t5.py`), and fine-tuning starts after 100,000 further updates of prefix
language modeling: name such a run in config.init.from. Adafactor, lr 5e-4, dropout 0.05; 64 rows of
1,024 + 256 tokens, in which examples are packed without attending to each other.

    lm train --config experiments/flan_t5.py:small --workdir runs/flan --config.init.from=runs/t5 \
        --config.data.tokenizer=run:runs/t5 --config.data.source=jsonl:DIR/*.jsonl.gz
"""

from lm.config import choose, default
from lm.recipes import t5_block, t5_training

VARIANTS = {  # paper entry, layers per stack, d_model, heads, d_ff, updates
    "small": ("flan-t5-small", 8, 512, 6, 1024, 98_000),
    "base": ("flan-t5-base", 12, 768, 12, 2048, 84_000),
    "large": ("flan-t5-large", 24, 1024, 16, 2816, 64_000),
    "xl": ("flan-t5-xl", 24, 2048, 32, 5120, 38_000),
    "xxl": ("flan-t5-xxl", 24, 4096, 64, 10_240, 14_000),
}


def get_config(variant="small"):
    config = default()
    model, data, row = config.model, config.data, choose(VARIANTS, variant)
    t5_block(config)
    config.paper, model.n_layers, model.d_model, model.n_heads, model.d_ff, steps = row
    model.vocab_size = 32_128
    model.dropout = model.attention_dropout = model.activation_dropout = 0.05
    t5_training(config)
    config.objective.name = "seq2seq"
    data.source = "jsonl:flan/*.jsonl.gz"
    data.sequence_length, data.target_length, data.batch_size = 1024, 256, 64
    config.optimizer.learning_rate, config.schedule.name = 5e-4, "constant"
    config.schedule.hold_steps, config.train.steps = 0, steps
    config.eval.every_steps, config.eval.batch_size = 1000, 64
    config.decode.beam_size = 1
    return config
