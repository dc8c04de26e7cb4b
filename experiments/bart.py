"""BART (Lewis et al. 2020, §2): an encoder–decoder that reconstructs a corrupted text.

| variant | parameters  | paper's | tokens | FLOPs  | expected                 |
|---------|-------------|---------|--------|--------|--------------------------|
| base    | 139,420,416 | 140M    | 4.1T   | 1.2e21 |                          |
| large   | 406,291,456 | 400M *  | 4.1T   | 4.3e21 | MNLI 89.9, SQuAD F1 94.6 |

MNLI-m dev and SQuAD 1.1 dev (Table 2), from memory, not checked against the paper. * Count of the
release.

Post-norm, GELU, a norm after the embeddings; encoder and decoder each have a table of 1,024
positions with two extra rows in front. The sentences of a text are shuffled and 30 % of its tokens
masked, each span (3 tokens on average) by a single mask (§2.2, §4). 8,000 sequences, 500,000
updates; dropout 0.1, which the paper turns off for the last tenth. The paper does not give the
rest, which is RoBERTa's (`roberta.py`): Adam, learning rates, warmup, weight decay, 512 tokens,
50,265 byte-level pieces.

    lm train --config experiments/bart.py:base --workdir runs/bart --config.parallel.preset=data \
        --config.data.source=jsonl:DIR/*.jsonl.gz --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default, fill

COLUMNS = "paper model.n_layers model.d_model model.n_heads optimizer.learning_rate"
VARIANTS = {
    "base": ("bart-base", 6, 768, 12, 6e-4),
    "large": ("bart-large", 12, 1024, 16, 4e-4),
}


def get_config(variant="base"):
    config = default()
    model, data, optimizer, schedule = config.model, config.data, config.optimizer, config.schedule
    fill(config, COLUMNS, choose(VARIANTS, variant))
    model.family, model.vocab_size, model.max_length = "encoder_decoder", 50_265, 1024
    model.norm_placement, model.norm_eps, model.embedding_norm = "post", 1e-5, True
    model.positions, model.position_offset, model.separate_embeddings = "learned", 2, True
    model.activation = "gelu_erf"
    model.dropout = model.attention_dropout = 0.1
    model.scale_residual_init = False

    config.objective.name = "denoising"
    data.source = "jsonl:corpus/*.jsonl.gz"
    data.tokenizer = "tokenizers:bart.json"
    data.validation_fraction = 0.0005
    data.sequence_length, data.batch_size = 512, 8000

    optimizer.adamw.b2, optimizer.adamw.eps = 0.98, 1e-6
    optimizer.weight_decay, optimizer.clip_norm = 0.01, 0.0
    schedule.name, schedule.final_ratio, schedule.warmup_steps = "linear", 0.0, 30_000
    config.train.steps = 500_000
    config.eval.every_steps, config.eval.batch_size, config.eval.max_batches = 5000, 250, 20
    return config
