"""ELECTRA (Clark et al. 2020, §3.1 and Table 6): detect which tokens a generator replaced.

| variant | parameters  | paper's | tokens | FLOPs  | expected             |
|---------|-------------|---------|--------|--------|----------------------|
| base    | 108,891,648 | 110M    | 100B   | 5.7e19 | MNLI 88.8            |
| large   | 334,092,288 | 335M    | 1.84T  | 3.6e21 | MNLI 90.9, GLUE 89.5 |
| tiny    |             |         |        |        |                      |

MNLI dev: base of the released model, large after 1.75M updates (Table 2), from memory, not checked
against the paper. Parameters are those of ElectraModel, the discriminator, without the pretraining
heads and what the generator does not share.

BERT's model, and a generator with as many layers and a third (large: a quarter) of the width, heads
and d_ff, which shares the embeddings and their norm. 15 % (large: 25 %) of the tokens are masked;
the discriminator's loss has weight 50. Adam (0.9, 0.999, eps 1e-6), weight decay 0.01, lr 2e-4
after 10,000 warmup steps, linear to 0; 256 sequences of 512 tokens, 766,000 updates (large: 2,048
and 1,750,000); dropout 0.1. Different from the released code: as in the paper, all predicted tokens
are masked (there, 85 % of them).

    lm train --config experiments/electra.py:tiny --workdir runs/electra
    lm train --config experiments/electra.py:base --workdir runs/base \
        --config.parallel.preset=data --config.data.source=jsonl:DIR/*.jsonl.gz \
        --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default, fill
from lm.recipes import trial

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads model.generator_width objective.mask_rate "
    "data.batch_size train.steps"
)
VARIANTS = {
    "base": ("electra-base", 12, 768, 12, 256, 0.15, 256, 766_000),
    "large": ("electra-large", 24, 1024, 16, 256, 0.25, 2048, 1_750_000),
    "tiny": ("", 4, 128, 4, 64, 0.15, 16, 500),
}


def get_config(variant="base"):
    config = default()
    model, data, optimizer, schedule = config.model, config.data, config.optimizer, config.schedule
    fill(config, COLUMNS, choose(VARIANTS, variant))
    model.family = "encoder"
    model.norm_placement, model.norm_eps, model.embedding_norm = "post", 1e-12, True
    model.positions, model.token_types = "learned", 2
    model.activation = model.pooler_activation = "gelu_erf"
    model.dropout = model.attention_dropout = 0.1
    model.scale_residual_init, model.init_truncated = False, True
    config.objective.name = "replaced_tokens"

    if variant == "tiny":
        model.embedding_size = 64
        model.dropout = model.attention_dropout = 0.0
        optimizer.learning_rate = 1e-3
        trial(config)
        data.sequence_length = 128
        return config

    model.vocab_size = 30_522
    data.source = "jsonl:corpus/*.jsonl.gz"
    data.tokenizer = "tokenizers:wordpiece.json"
    data.validation_fraction = 0.0005
    data.sequence_length = 512
    optimizer.learning_rate, optimizer.weight_decay = 2e-4, 0.01
    optimizer.adamw.b2, optimizer.adamw.eps = 0.999, 1e-6
    optimizer.adamw.bias_correction = False
    schedule.name, schedule.final_ratio, schedule.warmup_steps = "linear", 0.0, 10_000
    config.eval.every_steps, config.eval.max_batches = 10_000, 20
    return config
