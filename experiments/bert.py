"""BERT (Devlin et al. 2018, §3 and A.2): masked words and next sentences.

| variant     | layers | d_model | heads | with both heads | encoder and pooler | paper's count |
|-------------|--------|---------|-------|-----------------|--------------------|---------------|
| base        | 12     | 768     | 12    | 110,106,428     | 109,482,240        | 110M          |
| large       | 24     | 1024    | 16    | 336,226,108     | 335,141,888        | 340M          |
| base-cased  | 12     | 768     | 12    | 108,932,934     | 108,310,272        | 110M          |
| large-cased | 24     | 1024    | 16    | 334,661,958     | 333,579,264        | 340M          |
| tiny        | 2      | 128     | 2     | trains on the embedded corpus; for trying things out |

Figures: MNLI-m 84.6 / 86.7, SST-2 93.5 / 94.9 (test), SQuAD 1.1 F1 88.5 / 90.9 (dev).

Adam (0.9, 0.999, eps 1e-6), decay 0.01 except of biases and norms, clip 1.0, lr 1e-4 after 10,000
steps, then linearly to 0 at 1,000,000; 256 sequences of 512 tokens; dropout 0.1. Different from the
paper: all steps have 512 tokens (there 90 % of them have 128), masks are drawn anew for every
example, Adam corrects its bias, and initial weights aren't truncated at two deviations. GELU is
the exact one, as in the released checkpoints' Hugging Face configuration; google-research/bert has
the tanh form today.

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
    model.scale_residual_init = False

    config.objective.name, config.objective.next_sentence = "masked", True
    optimizer, schedule = config.optimizer, config.schedule
    optimizer.learning_rate, optimizer.weight_decay = 1e-4, 0.01
    optimizer.adamw.b2, optimizer.adamw.eps = 0.999, 1e-6
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
