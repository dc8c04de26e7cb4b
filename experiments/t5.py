"""T5 (Raffel et al. 2020, §3.1 and §3.7) and its version 1.1 (Shazeer 2020's gated feed-forward).

| variant   | parameters  | paper's | tokens | FLOPs  | expected                             |
|-----------|-------------|---------|--------|--------|--------------------------------------|
| small     | 60,506,624  | 60M     | 1.28T  | 1.7e20 | GLUE 77.4, SQuAD F1 87.24, EnDe 26.7 |
| base      | 222,903,552 | 220M    | 1.28T  | 7.6e20 | GLUE 82.7, SQuAD F1 92.08, EnDe 30.9 |
| large     | 737,668,096 | 770M    | 1.28T  | 2.7e21 | GLUE 86.4, SQuAD F1 93.79, EnDe 32.0 |
| 1.1-small | 76,961,152  | 77M     | 1.28T  | 1.7e20 | SQuAD F1 86.63                       |
| 1.1-base  | 247,577,856 | 250M    | 1.28T  | 7.6e20 |                                      |
| 1.1-large | 783,150,080 | 800M    | 1.28T  | 2.8e21 | SQuAD F1 93.21                       |

Scores after fine-tuning (Table 14; 1.1: NVIDIA's reproduction on the Pile). Those of 1.0 are from a
mixture of tasks and C4; this is the unsupervised part, which is all that 1.1 is trained on.

RMSNorm before each sublayer, no biases, heads of 64 numbers, scores not divided by their root, 32
relative positions that all layers of a stack share. 1.0: ReLU, the output is the embeddings'
matrix divided by √d; 1.1: gated tanh-GELU, an output matrix, no dropout while pretraining. Spans of
3 tokens, 15 % of 568, make 512 + 114 tokens. Adafactor, lr 1/√max(t, 10⁴) times the parameter's
root mean square, no decay, no clipping, z-loss 1e-4; 2,048 sequences, 1,000,000 updates.
Different from the released code: Adafactor does not factor the attention kernels, whose heads are
too small for its 128.

    lm train --config experiments/t5.py:1.1-small --workdir runs/t5 --config.parallel.preset=data \
        --config.data.source=jsonl:DIR/*.jsonl.gz --config.data.tokenizer=sentencepiece:FILE.model
"""

from lm.config import choose, default

VARIANTS = {  # paper entry, layers of each stack, d_model, heads, d_ff
    "small": ("t5-v1.0-small", 6, 512, 8, 2048),
    "base": ("t5-v1.0-base", 12, 768, 12, 3072),
    "large": ("t5-v1.0-large", 24, 1024, 16, 4096),
    "1.1-small": ("t5-v1.1-small", 8, 512, 6, 1024),
    "1.1-base": ("t5-v1.1-base", 12, 768, 12, 2048),
    "1.1-large": ("t5-v1.1-large", 24, 1024, 16, 2816),
}


def get_config(variant="1.1-small"):
    config = default()
    model, data = config.model, config.data
    config.paper, model.n_layers, model.d_model, model.n_heads, model.d_ff = choose(
        VARIANTS, variant
    )
    model.family = "encoder_decoder"
    model.head_dim = 64
    model.vocab_size = 32_128  # 32,000 pieces, 100 sentinels, filled up
    model.norm, model.norm_eps, model.bias = "rmsnorm", 1e-6, False
    model.positions, model.attention_scale = "relative", 1.0
    model.final_dropout = True
    model.init, model.init_std, model.scale_residual_init = "fan_in", 1.0, False
    if variant.startswith("1.1"):
        model.activation, model.tie_embeddings = "geglu", False
    else:
        model.activation, model.scale_logits = "relu", True
        model.dropout = model.attention_dropout = model.activation_dropout = 0.1

    config.objective.name, config.objective.z_loss = "span_corruption", 1e-4
    data.source = "jsonl:c4/*.jsonl.gz"
    data.tokenizer = "sentencepiece:t5.model"
    data.validation_fraction = 0.0005
    data.sequence_length, data.batch_size = 512, 2048

    config.optimizer.name, config.optimizer.learning_rate = "adafactor", 0.01
    config.optimizer.weight_decay = config.optimizer.clip_norm = 0.0
    config.schedule.name, config.schedule.hold_steps = "inverse_sqrt", 10_000
    config.train.steps = 1_000_000
    config.eval.every_steps, config.eval.batch_size, config.eval.max_batches = 5000, 256, 20
    config.decode.beam_size, config.decode.length_penalty = 4, 0.6
    return config
