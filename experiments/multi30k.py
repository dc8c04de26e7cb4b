"""Multi30k English to German: a small Transformer from scratch (Wu et al. 2021, arXiv 2105.14462).

| variant | text                                     | BLEU on test2016       | here           |
|---------|------------------------------------------|------------------------|----------------|
| tok     | lower-cased, normalised, Moses-tokenised | 41.02 in the paper     | see RESULTS.md |
| raw     | as written                               | (sacreBLEU)            | see RESULTS.md |

The paper's recipe: 4 + 4 layers, d_model 128, 4 heads, d_ff 256, dropout 0.3, label smoothing 0.1,
10,000 joint pieces, 8,000 updates of 4,096 tokens, learning rate 5e-3 after 2,000 warmup steps,
then inverse square root; the last 10 checkpoints averaged, beam size 5. Different from the paper:
SentencePiece instead of BPE, and the length penalty. Under two hours on one core.

    LM_DATA_DIR=DIR lm train --config experiments/multi30k.py --workdir runs/multi30k
    LM_DATA_DIR=DIR lm eval --workdir runs/multi30k --task --split test --average 10

The test set of 2017 (33.36 in the paper) is another source:

    P=multi30k/test_2017_flickr.lc.norm.tok
    LM_DATA_DIR=DIR lm eval --workdir runs/multi30k --task --split test --average 10 \
        --config.data.test_source="parallel:$P.en|$P.de"
"""

from lm.config import choose, default

VARIANTS = {"tok": ("{}.lc.norm.tok.{}", ""), "raw": ("{}.{}", ".gz")}


def get_config(variant="tok"):
    pattern, suffix = choose(VARIANTS, variant)
    config = default()

    def pair(split, suffix=suffix):
        files = (f"multi30k/{pattern.format(split, side)}{suffix}" for side in ("en", "de"))
        return f"parallel:{'|'.join(files)}"

    model = config.model
    model.family = "encoder_decoder"
    model.n_layers, model.d_model, model.n_heads, model.d_ff = 4, 128, 4, 256
    model.norm_placement = "post"
    model.positions, model.activation = "sinusoidal", "relu"
    model.tie_embeddings = model.scale_embeddings = True
    model.init, model.init_std, model.scale_residual_init = "xavier", 128**-0.5, False
    model.dropout = 0.3
    model.dtype = "bfloat16"

    config.objective.name, config.objective.label_smoothing = "seq2seq", 0.1

    data = config.data
    data.source = pair("train", ".gz")
    data.validation_source, data.test_source = pair("val"), pair("test_2016_flickr")
    data.tokenizer, data.tokenizer_vocab_size = "sentencepiece", 10_000
    data.sequence_length = data.target_length = 48
    data.batch_size = 86  # 4,128 tokens, with 48 per row

    config.optimizer.learning_rate, config.optimizer.weight_decay = 5e-3, 0.0
    config.optimizer.adamw.b2 = 0.98
    config.schedule.name, config.schedule.warmup_steps = "inverse_sqrt", 2000
    config.train.steps = 8000
    config.train.scan_unroll, config.train.loss_chunk = 0, 8
    config.train.steps_per_dispatch = 5
    config.eval.every_steps, config.eval.batch_size = 500, 22
    config.eval.metrics = "bleu_tok" if variant == "tok" else "bleu"
    config.checkpoint.every_steps, config.checkpoint.keep_last = 100, 10
    config.log.tensorboard = False
    config.decode.beam_size, config.decode.length_penalty = 5, 1.4
    config.decode.max_length = 100
    return config
