"""The Transformer (Vaswani et al. 2017, Tables 2 and 3), English to German and French.

| variant | parameters  | paper's | tokens | FLOPs  | expected         |
|---------|-------------|---------|--------|--------|------------------|
| base    | 63,045,632  | 65M     | 4.92B  | 6.5e17 | BLEU 27.3        |
| big     | 214,171,648 | 213M    | 14.7B  | 7.8e18 | BLEU 28.4        |
| base-fr | 60,485,632  |         | 4.92B  | 6.5e17 | BLEU 38.1        |
| big-fr  | 209,051,648 |         | 14.7B  | 7.8e18 | BLEU 41.0 / 41.8 |

BLEU is tokenized newstest2014, with compounds split for German; sacreBLEU gives about half a point
less. (41.0 in the proceedings, 41.8 in the later abstract.) The paper's counts do not match its
vocabulary of 37,000 pieces: about 41,000 rows reproduce base, and 35,900 big.

Six post-norm layers in each stack, sinusoidal positions, one matrix of 37,000 pieces (French:
32,000) for the output and both embeddings, which are multiplied by √d; label smoothing 0.1.
Attention has no biases. Adam (0.9, 0.98, eps 1e-9), no weight decay, no clipping; lr = d^-0.5
min(t^-0.5, t 4000^-1.5); batches of about 25,000 tokens per side; the last 5 (big: 20) checkpoints
averaged, beam size 4, length penalty 0.6. The paper does not describe the initialization; this is
tensor2tensor's: Glorot for kernels, standard deviation d^-0.5 for the embeddings.

    lm train --config experiments/transformer2017.py:base --workdir runs/transformer \
        --config.parallel.preset=data --config.data.tokenizer=sentencepiece:FILE.model \
        --config.data.source="parallel:DIR/train.en.gz|DIR/train.de.gz" \
        --config.data.validation_source="parallel:DIR/newstest2013.en|DIR/newstest2013.de"
    lm eval --workdir runs/transformer --task --split test --average 5
"""

from lm.config import choose, default, fill

COLUMNS = "paper model.d_model model.d_ff model.n_heads model.dropout model.vocab_size train.steps"
VARIANTS = {
    "base": ("transformer-base-en-de", 512, 2048, 8, 0.1, 37_000, 100_000),
    "big": ("transformer-big-en-de", 1024, 4096, 16, 0.3, 37_000, 300_000),
    "base-fr": ("transformer-base-en-fr", 512, 2048, 8, 0.1, 32_000, 100_000),
    "big-fr": ("transformer-big-en-fr", 1024, 4096, 16, 0.1, 32_000, 300_000),
}


def get_config(variant="base"):
    config = default()
    model, data, optimizer, schedule = config.model, config.data, config.optimizer, config.schedule
    fill(config, COLUMNS, choose(VARIANTS, variant))
    model.family = "encoder_decoder"
    model.n_layers = 6
    model.norm_placement, model.norm_eps = "post", 1e-6
    model.positions, model.activation = "sinusoidal", "relu"
    model.attention_bias = "none"
    model.tie_embeddings = model.scale_embeddings = True
    model.init, model.init_std, model.scale_residual_init = "xavier", model.d_model**-0.5, False

    config.objective.name, config.objective.label_smoothing = "seq2seq", 0.1
    target = "fr" if variant.endswith("fr") else "de"
    data.source = f"parallel:wmt14/train.en.gz|wmt14/train.{target}.gz"
    data.validation_source = f"parallel:wmt14/newstest2013.en|wmt14/newstest2013.{target}"
    data.test_source = f"parallel:wmt14/newstest2014.en|wmt14/newstest2014.{target}"
    data.tokenizer = f"sentencepiece:wmt14/en-{target}.model"
    data.sequence_length = data.target_length = 256
    data.batch_size = 96  # packed rows: 24,576 tokens per side

    optimizer.learning_rate = (model.d_model * 4000) ** -0.5  # maximum of the formula
    optimizer.adamw.b2, optimizer.adamw.eps = 0.98, 1e-9
    optimizer.weight_decay = optimizer.clip_norm = 0.0
    schedule.name, schedule.warmup_steps = "inverse_sqrt", 4000
    config.eval.every_steps = 5000
    config.checkpoint.every_steps, config.checkpoint.keep_last = 1500, 20
    config.decode.beam_size, config.decode.length_penalty = 4, 0.6
    return config
