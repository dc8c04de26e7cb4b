"""AESLC: write the subject line of an email, with an encoder–decoder trained from scratch.

| model                                         | ROUGE-1 / 2 / L on test |
|-----------------------------------------------|-------------------------|
| Transformer-base from scratch (PEGASUS paper) | 15.04 / 7.39 / 14.93    |
| PEGASUS-base, pretrained                      | 34.85 / 18.94 / 34.10   |

`small`: 3 + 3 layers, d_model 192, rotary positions, Muon; 8,000 pieces trained on the corpus;
emails truncated to 127 pieces. `copy`, at a third of the compute per step: a pointer-generator (See
et al. 2017) with 2 + 1 layers, d_model 128, whose subjects have at least six pieces. Its 4,000
pieces are lowercased, so that a word of the email can be copied whatever its case in the subject;
emails have up to 191 pieces, and short ones are packed. ROUGE uses stemming, as in PEGASUS's
evaluation, and ignores case. Our results are in RESULTS.md.

    LM_DATA_DIR=DIR lm train --config experiments/aeslc.py --workdir runs/aeslc
    LM_DATA_DIR=DIR lm eval --workdir runs/aeslc --best --task --split test
"""

from lm.config import choose, default

VARIANTS = {"small": False, "copy": True}


def get_config(variant="small"):
    copies = choose(VARIANTS, variant)
    config = default()

    model = config.model
    model.family = "encoder_decoder"
    model.n_layers, model.d_model, model.n_heads, model.d_ff = 3, 192, 6, 512
    model.positions, model.activation = "rotary", "relu"
    model.tie_embeddings = model.scale_embeddings = True
    model.init, model.init_std, model.scale_residual_init = "xavier", 192**-0.5, False
    model.dropout = 0.2
    model.dtype = "bfloat16"

    config.objective.name, config.objective.label_smoothing = "seq2seq", 0.1
    data = config.data
    data.source = "jsonl:aeslc/train.jsonl.gz"
    data.validation_source = "jsonl:aeslc/dev.jsonl.gz"
    data.test_source = "jsonl:aeslc/test.jsonl.gz"
    data.columns = "source=body,target=subject"
    data.bad_rows = "skip"  # a few emails are empty
    data.tokenizer, data.tokenizer_vocab_size = "sentencepiece", 8000
    data.sequence_length, data.target_length = 128, 24
    data.batch_size = 32

    config.optimizer.name, config.optimizer.learning_rate = "muon", 0.02
    config.optimizer.weight_decay = 0.01
    config.optimizer.adamw.b2 = 0.98
    config.schedule.name, config.schedule.final_ratio = "linear", 0.02
    config.schedule.warmup_steps = 400
    config.train.steps = 4000
    config.train.scan_unroll, config.train.loss_chunk = 0, 16
    config.train.steps_per_dispatch = 5
    config.eval.every_steps, config.eval.best = 500, "accuracy"
    config.eval.metrics = "rouge_stemmed"
    config.checkpoint.every_steps = 500
    config.log.tensorboard = False
    config.decode.beam_size, config.decode.length_penalty = 4, 0.6
    config.decode.max_length = 24
    if copies:
        model.copy, data.lowercase = True, True
        model.n_layers, model.n_decoder_layers = 2, 1
        model.d_model, model.n_heads, model.d_ff = 128, 4, 256
        model.init_std, model.dropout = 128**-0.5, 0.15
        config.objective.label_smoothing = 0.0  # wasted on tokens outside the source
        data.tokenizer_vocab_size = 4000
        data.sequence_length, data.batch_size = 192, 12
        config.train.loss_chunk, config.schedule.warmup_steps = 0, 200
        config.train.steps = 7000
        config.decode.min_length, config.decode.length_penalty = 6, 1.0
    return config
