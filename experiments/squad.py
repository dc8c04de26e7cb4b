"""SQuAD 1.1, extractive question answering: fine-tuning BERT (Devlin et al. 2018, §4.2).

| variant | model                                     | exact match / F1 on dev    |
|---------|-------------------------------------------|----------------------------|
| base    | BERT base, uncased                        | 80.8 / 88.5 in the paper   |
| large   | BERT large, uncased                       | 84.1 / 90.9 in the paper   |
| xquad   | 2 layers, d 64, from scratch on 1,071     | none: a quick test on a    |
|         | questions of XQuAD                        | CPU, in minutes            |

3 epochs of batches of 32 at learning rate 5e-5; rows of 384 tokens, long contexts in windows with a
stride of 128. Uncased WordPiece gives about 88,500 windows, so 8,300 steps. The paper does not
state warmup and decay: its code warms up for a tenth of the steps, then decays linearly to 0. For
SQuAD 2.0, with unanswerable questions, name its files in config.data.source and
config.data.validation_source and train for 2 epochs of batches of 48, which is 5,500 steps.

    LM_DATA_DIR=DIR lm train --config experiments/squad.py:base --workdir runs/squad \
        --config.init.from=runs/bert --config.data.tokenizer=run:runs/bert
    LM_DATA_DIR=DIR lm eval --workdir runs/squad --task
"""

from lm.config import choose, default

VARIANTS = {  # layers, d_model, heads, vocabulary
    "base": (12, 768, 12, 30_522),
    "large": (24, 1024, 16, 30_522),
    "xquad": (2, 64, 2, 2_000),
}


def get_config(variant="base"):
    config = default()
    model, data = config.model, config.data
    model.n_layers, model.d_model, model.n_heads, model.vocab_size = choose(VARIANTS, variant)
    model.family = "encoder"
    model.norm_placement, model.norm_eps, model.embedding_norm = "post", 1e-12, True
    model.positions, model.token_types = "learned", 2
    model.activation = "gelu_erf"
    model.scale_residual_init = False

    config.objective.name = "span_qa"
    optimizer, schedule = config.optimizer, config.schedule
    optimizer.weight_decay, optimizer.adamw.b2, optimizer.adamw.eps = 0.01, 0.999, 1e-6
    schedule.name, schedule.final_ratio = "linear", 0.0

    if variant == "xquad":
        data.source, data.validation_fraction = "squad:xquad/xquad.en.json", 0.1
        data.tokenizer, data.tokenizer_vocab_size = "sentencepiece", model.vocab_size
        data.sequence_length, data.doc_stride, data.batch_size = 128, 64, 16
        optimizer.learning_rate, schedule.warmup_steps = 1e-3, 30
        config.train.steps, config.train.steps_per_dispatch = 600, 10
        config.train.scan_unroll = 0
        config.eval.every_steps = 200
        config.log.tensorboard = False
        return config

    model.max_length, model.dropout, model.attention_dropout = 512, 0.1, 0.1
    data.source = "squad:train-v1.1.json"
    data.validation_source = "squad:dev-v1.1.json"
    data.tokenizer = "tokenizers:wordpiece.json"
    data.sequence_length, data.doc_stride, data.batch_size = 384, 128, 32
    config.init.fresh = "span_head"
    config.init.leave = "transform|logit_bias|pooler|sentence_head"
    optimizer.learning_rate = 5e-5
    schedule.warmup_steps = 830
    config.train.steps = 8300
    config.eval.every_steps = 2000
    return config
