"""Does pretraining help? A tiny BERT pretrained on WikiText-2 and fine-tuned on SST-2.

| variant  | task                                                                  |
|----------|-----------------------------------------------------------------------|
| pretrain | masked LM on lowercased WikiText-2: 2 layers, d 128, 4 heads          |
| finetune | SST-2 from those weights: config.init.from and data.tokenizer name it |
| scratch  | SST-2 from random weights, everything else the same                   |

The baseline is the same model trained on SST-2 from scratch. RESULTS.md has the mean and standard
deviation of the best dev accuracy over three seeds each. With BERT's post-norm, learned positions
and AdamW, a model this small predicts little more than word frequencies for thousands of steps.
With pre-norm, rotary positions, Muon and 30 % masking (Wettig et al. 2022), it leaves that plateau
after 200 steps.

    LM_DATA_DIR=DIR lm train --config experiments/tiny_bert.py:pretrain --workdir runs/tiny_bert
    LM_DATA_DIR=DIR lm train --config experiments/tiny_bert.py:finetune --workdir runs/finetuned \
        --config.init.from=runs/tiny_bert --config.data.tokenizer=run:runs/tiny_bert
    LM_DATA_DIR=DIR lm eval --workdir runs/finetuned --best --task --split test
"""

from lm.config import choose, default

VARIANTS = ("pretrain", "finetune", "scratch")


def get_config(variant="pretrain"):
    choose(dict.fromkeys(VARIANTS), variant)
    config = default()

    model = config.model
    model.family = "encoder"
    model.n_layers, model.d_model, model.n_heads = 2, 128, 4
    model.max_length, model.vocab_size = 128, 8_001  # pieces and [MASK]
    model.positions, model.embedding_norm = "rotary", True
    model.activation, model.pooling = "gelu_tanh", "mean"
    model.scale_residual_init = False

    data = config.data
    data.tokenizer, data.tokenizer_vocab_size, data.lowercase = "sentencepiece", 8_000, True
    config.optimizer.adamw.b2, config.optimizer.weight_decay = 0.98, 0.01
    config.optimizer.decay = "kernels"
    config.schedule.name, config.schedule.final_ratio = "linear", 0.0
    config.train.scan_unroll, config.train.steps_per_dispatch = 0, 10
    config.log.tensorboard = False

    if variant == "pretrain":
        config.objective.name, config.objective.mask_rate = "masked", 0.3
        data.source = "text:wikitext2/wiki.train.tokens.gz"
        data.validation_source = "text:wikitext2/wiki.valid.tokens.gz"
        data.sequence_length, data.batch_size = 128, 32
        config.optimizer.name, config.optimizer.learning_rate = "muon", 0.02
        config.schedule.warmup_steps = 100
        config.train.steps = 6000
        config.eval.every_steps = config.checkpoint.every_steps = 500
        return config

    config.objective.name = "classification"
    data.source = "tsv:sst2/glue/train.tsv.gz"
    data.validation_source = "tsv:sst2/glue/dev.tsv"
    data.test_source = "tsv:sst2/glue/test-labeled.tsv"
    data.columns, data.labels = "text=sentence,label=label", "0,1"
    data.sequence_length, data.batch_size = 48, 64
    model.dropout = 0.1
    config.optimizer.learning_rate = 2e-3
    config.schedule.warmup_steps = 100
    config.train.steps = 500  # half an epoch
    config.eval.every_steps, config.eval.batch_size = 100, 109
    config.eval.best = "accuracy"
    config.checkpoint.every_steps = 500
    if variant == "finetune":
        config.init.fresh = "classifier"
        config.init.leave = "transform,logit_bias"
    return config
