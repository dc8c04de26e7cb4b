"""Word-level WikiText-2: a small LSTM and a small Transformer, up to two hours on two cores each.

| variant     | model                                                   | target perplexity    |
|-------------|---------------------------------------------------------|----------------------|
| lstm        | 2 layers of 400, d 200, tied, dropout, state carried    | 150                  |
| transformer | 4 layers, d 128, 4 heads, rotary, tied, dropout         | 160                  |

    sum, concat: ways to join the outputs of layers, at equal parameters, by pieces; see below.

The vocabulary is the corpus's own: 33,278 words with <eos>, so a token is a word. For comparison:
AWD-LSTM (33M parameters, 750 epochs) reaches 65.6. Ours: see RESULTS.md.

    LM_DATA_DIR=DIR lm train --config experiments/wikitext2.py:lstm --workdir runs/wikitext2
    LM_DATA_DIR=DIR lm eval --workdir runs/wikitext2 --best --split test

The pair `sum` (787,584 non-embedding parameters) and `concat` (788,096) compares the residual sum
H + h with concatenation, H^l = concat(H^{l-1}, h^{l-1} W^l): the `transformer` above with 2,048
SentencePiece pieces and fewer steps, some minutes of one core each. Three seeds:

    export LM_DATA_DIR=DIR
    for seed in 0 1 2; do for variant in sum concat; do
        config="experiments/wikitext2.py:$variant" run="runs/$variant-$seed"
        lm train --config $config --config.seed=$seed --workdir $run
        lm eval --workdir $run; lm eval --workdir $run --split test
    done; done
"""

from lm.config import choose, default

VARIANTS = ("lstm", "transformer", "sum", "concat")


def get_config(variant="lstm"):
    choose(dict.fromkeys(VARIANTS), variant)
    config = default()

    model, data = config.model, config.data
    model.vocab_size = 33_278
    model.tie_embeddings = True
    model.dtype = "bfloat16"
    if variant == "lstm":
        model.family, model.carry = "lstm", True
        model.n_layers, model.d_model, model.d_hidden = 2, 200, 400
        model.init, model.init_std, model.dropout = "uniform", 0.05, 0.2
        data.order, data.isolate_documents = "contiguous", False
        data.sequence_length, data.batch_size = 35, 32
    else:
        model.n_layers, model.d_model, model.n_heads, model.d_ff = 4, 128, 4, 512
        model.positions, model.norm, model.bias = "rotary", "rmsnorm", False
        model.dropout = 0.1
        data.sequence_length, data.batch_size = 128, 9

    data.source = "text:wikitext2/wiki.train.tokens.gz"
    data.validation_source = "text:wikitext2/wiki.valid.tokens.gz"
    data.test_source = "text:wikitext2/wiki.test.tokens.gz"
    data.tokenizer, data.tokenizer_vocab_size = "words", 40_000

    config.optimizer.learning_rate, config.optimizer.weight_decay = 2e-3, 0.0
    config.optimizer.adamw.b2, config.optimizer.clip_norm = 0.99, 0.25
    if variant != "lstm":
        config.optimizer.name, config.optimizer.learning_rate = "muon", 0.02
        config.optimizer.weight_decay, config.optimizer.clip_norm = 0.05, 1.0
    config.schedule.name, config.schedule.final_ratio = "linear", 0.02
    config.schedule.warmup_steps = 200
    config.train.steps = 8000 if variant == "lstm" else 4000  # 4.3 and 2.2 epochs
    config.train.scan_unroll, config.train.loss_chunk = 0, 0 if variant == "lstm" else 64
    config.train.steps_per_dispatch = 5
    if variant in ("sum", "concat"):
        model.vocab_size = data.tokenizer_vocab_size = 2048
        data.tokenizer = "sentencepiece"
        config.train.steps, config.train.loss_chunk = 600, 0
        model.residual = variant
        if variant == "concat":  # narrower feed-forward layers offset the wider inputs
            model.concat_width, model.d_ff = 32, 232
    n_evaluations = 1 if variant in ("sum", "concat") else 5
    config.eval.every_steps, config.eval.best = config.train.steps // n_evaluations, "-loss"
    config.checkpoint.every_steps = 400
    config.log.tensorboard = False
    return config
