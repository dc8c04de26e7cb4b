"""DeBERTa-v3 (He et al. 2023, §3 and Table 10): disentangled attention, ELECTRA's objective.

| variant | parameters  | paper's | tokens | FLOPs  | expected                     |
|---------|-------------|---------|--------|--------|------------------------------|
| base    | 183,831,552 | 184M    | 2.1T   | 1.6e21 | MNLI 90.6, SQuAD 2.0 F1 88.4 |
| large   | 434,012,160 | 435M    | 2.1T   | 5.7e21 | MNLI 91.8, SQuAD 2.0 F1 91.5 |
| tiny    |             |         |        |        |                              |

MNLI-m dev and SQuAD 2.0 dev (Tables 3 and 4). Scores and recipe are from memory, not checked
against the paper. Parameters are those of DebertaV2Model, without the generator and the pretraining
heads.

BERT's layers without position embeddings in the input. Attention logits are the sum of
content-to-content, content-to-position and position-to-content terms, over √(3 d). All layers share
one table of 512 relative positions, in logarithmic buckets for distances from 128 to 512. A
generator with half the layers and the same embeddings replaces 15 % of the tokens; the
discriminator's loss has weight 50. 128,100 pieces; 8,192 sequences of 512 tokens, 500,000 updates;
Adam (0.9, 0.98, eps 1e-6), weight decay 0.01, lr 6e-4 (large: 3e-4) after 10,000 warmup steps,
linear to 0; dropout 0.1. Different from the paper: the discriminator's gradient reaches the
embeddings (ELECTRA's sharing instead of gradient-disentangled sharing).

    lm train --config experiments/deberta.py:tiny --workdir runs/deberta
    lm train --config experiments/deberta.py:base --workdir runs/base \
        --config.parallel.preset=data --config.data.source=jsonl:DIR/*.jsonl.gz \
        --config.data.tokenizer=sentencepiece:FILE.model
"""

from lm.config import choose, default, fill
from lm.recipes import trial

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads model.generator_layers "
    "model.relative_buckets optimizer.learning_rate"
)
VARIANTS = {
    "base": ("deberta-v3-base", 12, 768, 12, 6, 512, 6e-4),
    "large": ("deberta-v3-large", 24, 1024, 16, 12, 512, 3e-4),
    "tiny": ("", 4, 128, 4, 2, 64, 1e-3),
}


def get_config(variant="base"):
    config = default()
    model, data, optimizer, schedule = config.model, config.data, config.optimizer, config.schedule
    fill(config, COLUMNS, choose(VARIANTS, variant))
    model.family = "encoder"
    model.norm_placement, model.norm_eps, model.embedding_norm = "post", 1e-7, True
    model.mixer = model.positions = "disentangled"
    model.relative_max_distance = 512
    model.activation = model.pooler_activation = "gelu_erf"
    model.dropout = model.attention_dropout = 0.1
    model.scale_residual_init = False
    config.objective.name = "replaced_tokens"

    if variant == "tiny":
        model.dropout = model.attention_dropout = 0.0
        trial(config)
        data.sequence_length = 128
        return config

    model.vocab_size = 128_100
    data.source = "jsonl:corpus/*.jsonl.gz"
    data.tokenizer = "sentencepiece:deberta.model"
    data.validation_fraction = 0.0005
    data.sequence_length, data.batch_size = 512, 8192
    optimizer.weight_decay = 0.01
    optimizer.adamw.b2, optimizer.adamw.eps = 0.98, 1e-6
    schedule.name, schedule.final_ratio, schedule.warmup_steps = "linear", 0.0, 10_000
    config.train.steps = 500_000
    config.eval.every_steps, config.eval.batch_size, config.eval.max_batches = 10_000, 256, 20
    return config
