"""nanoGPT's two character-level recipes on tiny-shakespeare, and an improved one.

Reference (whole validation part, last 10 % of the text, nats a character):

| variant | model                          | batch    | steps | reference | here            |
|---------|--------------------------------|----------|-------|-----------|-----------------|
| cpu     | 4 layers, 4 heads, d 128       | 12 × 64  | 2,000 | 1.904     | 1.9046          |
| gpu     | 6 layers, 6 heads, d 384       | 64 × 256 | 5,000 | 1.4697    | (not run here)  |
| best    | as cpu, rotary, RMSNorm, Muon  | 3 × 256  | 2,000 | –         | 1.5427          |

`best` keeps the data, steps, tokens per batch (768), depth and width of `cpu` and has 8,192 fewer
parameters. 1.904 is the mean of nanoGPT's own code for two seeds (1.9053, 1.9031); its README's
1.88 and 1.4697 are estimates from random batches. Data: `input.txt` of karpathy/char-rnn, 1,115,394
characters, in the folder `tinyshakespeare` under $LM_DATA_DIR.

    LM_DATA_DIR=DIR lm train --config experiments/shakespeare.py:cpu --workdir runs/shakespeare
"""

from lm.config import choose, default

VARIANTS = {  # layers, d_model, heads, context, batch, steps, dropout
    "cpu": (4, 128, 4, 64, 12, 2000, 0.0),
    "gpu": (6, 384, 6, 256, 64, 5000, 0.2),
    "best": (4, 128, 4, 256, 3, 2000, 0.0),
}


def get_config(variant="cpu"):
    n_layers, d_model, n_heads, length, batch, steps, dropout = choose(VARIANTS, variant)
    config = default()

    model = config.model
    model.n_layers, model.d_model, model.n_heads = n_layers, d_model, n_heads
    model.bias = model.norm_bias = False
    model.activation = "gelu_erf"
    model.dropout = model.attention_dropout = dropout
    model.vocab_size = 65

    data = config.data
    data.source = "text:tinyshakespeare/input.txt"
    data.validation_fraction = 0.1
    data.tokenizer = "char"
    data.sequence_length, data.batch_size = length, batch
    data.stride = 1  # windows start at every character
    data.isolate_documents = False

    config.train.steps = steps
    config.optimizer.learning_rate = 1e-3
    config.optimizer.decay = "matrices"
    config.optimizer.adamw.b2 = 0.99
    config.schedule.warmup_steps = 100
    # With 176 windows, the whole validation split is ten batches of the small models: one dispatch.
    config.eval.every_steps, config.eval.batch_size = 1000, 176 if batch < 64 else batch
    config.checkpoint.every_steps = 500
    config.log.tensorboard = False  # events take 1 of 35 ms per step

    if variant == "best":
        model.norm, model.positions, model.activation = "rmsnorm", "rotary", "gelu_tanh"
        config.optimizer.name, config.optimizer.learning_rate = "muon", 0.02
        config.optimizer.muon.adam_ratio = 0.15
        config.schedule.name, config.schedule.final_ratio = "linear", 0.0
        config.schedule.warmup_steps = 50

    config.train.scan_unroll = 0
    config.train.steps_per_dispatch = 10
    return config
