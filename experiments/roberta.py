"""RoBERTa (Liu et al. 2019, §3.1 and Table 9): BERT without next sentences, trained longer.

| variant | parameters  | paper's | tokens | FLOPs  | expected              |
|---------|-------------|---------|--------|--------|-----------------------|
| base    | 124,697,433 | 125M    | 2.1T   | 1.1e21 | MNLI 87.6, SST-2 94.8 |
| large   | 355,412,057 | 355M    | 2.1T   | 3.8e21 | MNLI 90.2, SST-2 96.4 |

Scores are GLUE dev, from fairseq's README. Parameters are those of Hugging Face's
RobertaForMaskedLM, which has one token type embedding (fairseq has none) and 514 positions, of
which the first two are for padding.

Adam (0.9, 0.98, eps 1e-6), weight decay 0.01, no clipping, lr 6e-4 after 24,000 warmup steps
(large: 4e-4 after 30,000), linear to 0 at 500,000; 8,192 sequences of 512 tokens that cross
documents; dropout 0.1; 50,265 byte-level pieces. fairseq's public configuration is a smaller
recipe.

    lm train --config experiments/roberta.py:base --workdir runs/roberta \
        --config.parallel.preset=data --config.data.source=jsonl:DIR/*.jsonl.gz \
        --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default, fill

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads optimizer.learning_rate schedule.warmup_steps"
)
VARIANTS = {
    "base": ("roberta-base", 12, 768, 12, 6e-4, 24_000),
    "large": ("roberta-large", 24, 1024, 16, 4e-4, 30_000),
}


def get_config(variant="base"):
    config = default()
    model, data, optimizer, schedule = config.model, config.data, config.optimizer, config.schedule
    fill(config, COLUMNS, choose(VARIANTS, variant))
    model.family = "encoder"
    model.vocab_size = 50_265
    model.norm_placement, model.norm_eps, model.embedding_norm = "post", 1e-5, True
    model.positions, model.position_offset, model.token_types = "learned", 2, 1
    model.activation = "gelu_erf"
    model.dropout = model.attention_dropout = 0.1
    model.scale_residual_init = False

    config.objective.name = "masked"
    data.source = "jsonl:corpus/*.jsonl.gz"
    data.tokenizer = "tokenizers:roberta.json"
    data.validation_fraction = 0.0005
    data.isolate_documents = False
    data.sequence_length, data.batch_size = 512, 8192

    optimizer.adamw.b2, optimizer.adamw.eps = 0.98, 1e-6
    optimizer.weight_decay, optimizer.clip_norm = 0.01, 0.0
    schedule.name, schedule.final_ratio = "linear", 0.0
    config.train.steps = 500_000
    config.eval.every_steps, config.eval.batch_size, config.eval.max_batches = 5000, 256, 20
    return config
