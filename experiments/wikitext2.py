"""WikiText-2 by words: a small LSTM and a small Transformer, at most two hours of two cores each.

| variant     | model                                                   | test perplexity, aim |
|-------------|---------------------------------------------------------|----------------------|
| lstm        | 2 layers of 400, d 200, tied, dropout, state carried    | 150                  |
| transformer | 4 layers, d 128, 4 heads, rotary, tied, dropout         | 160                  |

The vocabulary is the corpus's own: 33,278 words with <eos>, so a token is a word. For comparison:
AWD-LSTM (33M parameters, 750 epochs) reaches 65.6. Ours: see RESULTS.md.

    LM_DATA_DIR=DIR lm train --config experiments/wikitext2.py:lstm --workdir runs/wikitext2
    LM_DATA_DIR=DIR lm eval --workdir runs/wikitext2 --best --split test
"""

from lm.config import choose, default

VARIANTS = ("lstm", "transformer")


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
    if variant == "transformer":
        config.optimizer.name, config.optimizer.learning_rate = "muon", 0.02
        config.optimizer.weight_decay, config.optimizer.clip_norm = 0.05, 1.0
    config.schedule.name, config.schedule.final_ratio = "linear", 0.02
    config.schedule.warmup_steps = 200
    config.train.steps = 8000 if variant == "lstm" else 4000  # 4.3 and 2.2 epochs
    config.train.scan_unroll, config.train.loss_chunk = 0, 0 if variant == "lstm" else 64
    config.train.steps_per_dispatch = 5
    config.eval.every_steps, config.eval.best = config.train.steps // 5, "-loss"
    config.checkpoint.every_steps = 400
    config.log.tensorboard = False
    return config
