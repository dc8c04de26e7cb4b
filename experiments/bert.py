"""BERT (Devlin et al. 2018, §3 and A.2): masked language modeling and next-sentence prediction.

| variant     | parameters  | paper's | tokens | FLOPs  | expected                 |
|-------------|-------------|---------|--------|--------|--------------------------|
| base        | 109,482,240 | 110M    | 131B   | 6.7e19 | MNLI 84.6, SQuAD F1 88.5 |
| large       | 335,141,888 | 340M    | 131B   | 2.4e20 | MNLI 86.7, SQuAD F1 90.9 |
| base-cased  | 108,310,272 | 110M    | 131B   | 6.7e19 |                          |
| large-cased | 333,579,264 | 340M    | 131B   | 2.4e20 |                          |
| tiny        |             |         |        |        | for trying things out    |

MNLI-m test (Table 1), SQuAD 1.1 dev (Table 2). As in the paper, the parameters are those of encoder
and pooler; the heads of the two objectives add 624,188 (large: 1,084,220). Vocabularies are the
released ones, 30,522 and 28,996 pieces; the paper says 30,000.

Adam (0.9, 0.999, eps 1e-6) without bias correction; weight decay 0.01, except for biases and norms;
clipping at 1; lr 1e-4 after 10,000 warmup steps, then linear to 0 at 1,000,000; 256 sequences of
512 tokens; dropout 0.1; initialization N(0, 0.02²), truncated at two standard deviations; 15 % of
the tokens are predicted. Different from the paper: all steps have 512 tokens (in the paper, 90 % of
the steps have 128, for 43B tokens in total), and masks are drawn anew for every example. GELU is
exact, as in the Hugging Face configuration of the released checkpoints; google-research/bert now
uses the tanh approximation.

    lm train --config experiments/bert.py:base --workdir runs/bert --config.parallel.preset=data \
        --config.data.source=jsonl:DIR/*.jsonl.gz --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default

VARIANTS = {  # paper entry, layers, d_model, heads, vocabulary
    "base": ("bert-base-uncased", 12, 768, 12, 30_522),
    "large": ("bert-large-uncased", 24, 1024, 16, 30_522),
    "base-cased": ("bert-base-cased", 12, 768, 12, 28_996),
    "large-cased": ("bert-large-cased", 24, 1024, 16, 28_996),
    "tiny": ("", 2, 128, 2, 0),
}


def get_config(variant="base"):
    config = default()
    model, data = config.model, config.data
    config.paper, model.n_layers, model.d_model, model.n_heads, model.vocab_size = choose(
        VARIANTS, variant
    )
    model.family = "encoder"
    model.norm_placement, model.norm_eps, model.embedding_norm = "post", 1e-12, True
    model.positions, model.token_types = "learned", 2
    model.activation = "gelu_erf"
    model.dropout = model.attention_dropout = 0.1
    model.scale_residual_init, model.init_truncated = False, True

    config.objective.name, config.objective.next_sentence = "masked", True
    optimizer, schedule = config.optimizer, config.schedule
    optimizer.learning_rate, optimizer.weight_decay = 1e-4, 0.01
    optimizer.adamw.b2, optimizer.adamw.eps = 0.999, 1e-6
    optimizer.adamw.bias_correction = False
    schedule.name, schedule.final_ratio = "linear", 0.0

    if variant == "tiny":
        data.sequence_length, data.batch_size = 128, 16
        optimizer.learning_rate, schedule.warmup_steps = 1e-3, 50
        config.train.steps, config.train.scan_unroll = 500, 0
        return config

    data.source = "jsonl:corpus/*.jsonl.gz"
    data.tokenizer = "tokenizers:wordpiece.json"
    data.validation_fraction = 0.0005
    data.sequence_length, data.batch_size = 512, 256
    schedule.warmup_steps = 10_000
    config.train.steps = 1_000_000
    config.eval.every_steps, config.eval.max_batches = 10_000, 20
    return config
