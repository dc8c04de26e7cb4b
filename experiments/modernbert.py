"""ModernBERT (Warner et al. 2024, §2.1 and Table 4): BERT with the architecture of newer decoders.

| variant | parameters  | paper's | tokens | FLOPs  | expected  |
|---------|-------------|---------|--------|--------|-----------|
| base    | 149,655,232 | 149M    | 1.72T  | 1.1e21 | GLUE 88.4 |
| large   | 395,881,664 | 395M    | 1.72T  | 3.5e21 | GLUE 90.4 |
| tiny    |             |         |        |        |           |

GLUE dev (Table 1). Scores and recipe are from memory, not checked against the paper. Parameters are
those of ModernBertForMaskedLM, including the dense layer, norm and bias of its output.

Pre-norm without a norm before the first attention layer, no biases, RoPE, gated GELU, norms without
biases. Layers 1, 4, 7, … are global (RoPE base 160,000); the others attend to 64 tokens on either
side (base 10,000). 30 % of the tokens are masked. 4,608 sequences of 1,024 tokens, 1.72T tokens; lr
8e-4 (large: 5e-4), constant; weight decay 1e-5. Different from the paper: AdamW with clipping
instead of StableAdamW; no batch-size warmup; RoPE base 10,000 in all layers in the first phase, the
extension to 8,192 tokens and the final decay (1 - sqrt) are left out.

    lm train --config experiments/modernbert.py:tiny --workdir runs/modernbert
    lm train --config experiments/modernbert.py:base --workdir runs/base \
        --config.parallel.preset=data --config.data.source=jsonl:DIR/*.jsonl.gz \
        --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default, fill
from lm.recipes import trial

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads model.d_ff optimizer.learning_rate "
    "schedule.warmup_steps"
)
VARIANTS = {
    "base": ("modernbert-base", 22, 768, 12, 1152, 8e-4, 640),
    "large": ("modernbert-large", 28, 1024, 16, 2624, 5e-4, 425),
    "tiny": ("", 4, 128, 4, 192, 1e-3, 50),
}


def get_config(variant="base"):
    config = default()
    model, data, optimizer = config.model, config.data, config.optimizer
    fill(config, COLUMNS, choose(VARIANTS, variant))
    model.family, model.bias, model.norm_bias = "encoder", False, False
    model.embedding_norm, model.first_norm, model.transform_bias = True, False, False
    model.positions, model.rope_theta, model.rope_theta_local = "rotary", 160_000.0, 10_000.0
    model.window, model.global_every, model.global_first = 128, 3, True
    model.activation, model.init_truncated = "geglu_erf", True
    config.objective.name, config.objective.mask_rate = "masked", 0.3
    optimizer.adamw.b2, optimizer.adamw.eps = 0.98, 1e-6
    optimizer.weight_decay, optimizer.clip_norm = 1e-5, 1.0
    config.schedule.name = "constant"

    if variant == "tiny":
        trial(config)
        model.window = 16
        return config

    model.vocab_size, model.max_length = 50_368, 8192
    data.source = "jsonl:corpus/*.jsonl.gz"
    data.tokenizer = "tokenizers:modernbert.json"
    data.validation_fraction = 0.0005
    data.sequence_length, data.batch_size = 1024, 4608
    config.train.steps = round(1.72e12 / (1024 * 4608))
    config.eval.every_steps, config.eval.batch_size, config.eval.max_batches = 5000, 256, 20
    return config
