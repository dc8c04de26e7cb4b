"""GPT-2 (Radford et al. 2019, Table 2), trained by the public recipes of llm.c and nanoGPT.

| variant | parameters    | paper's | tokens | FLOPs  | expected                            |
|---------|---------------|---------|--------|--------|-------------------------------------|
| 124m    | 124,439,808   | 117M    | 10.3B  | 5.2e18 | WikiText-2 29.41; FineWeb loss 3.27 |
| 355m    | 354,823,168   | 345M    | 31.5B  | 5.7e19 | WikiText-2 22.76; FineWeb loss 2.93 |
| 774m    | 774,030,080   | 762M    | 31.5B  | 1.3e20 | WikiText-2 19.93                    |
| 1558m   | 1,557,611,200 | 1542M   | 33.6B  | 3.0e20 | WikiText-2 18.34                    |
| nanogpt | 124,373,760   | 123.59M | 295B   | 1.5e20 | OpenWebText loss 2.85               |

WikiText-2: perplexity per original word of OpenAI's checkpoints (Table 3), which were trained on
WebText. Losses are validation losses of llm.c and nanoGPT. The parameter counts in the paper are
wrong, as its authors say (README of the released code); nanoGPT's leaves out the position
embeddings.

The paper publishes no optimizer, schedule or token count. 124m, 355m and 1558m follow llm.c: AdamW
(0.9, 0.95), weight decay 0.1 on matrices, clipping at 1, a cosine to 0 after 700 warmup steps;
524,288 tokens per step (1558m: 1,048,576). 774m has no recipe there: its learning rate is that of
GPT-3's 760M, its number of steps 355m's. nanogpt has no biases, exact GELU, 50,304 rows, and a
cosine to 10 % with 2,000 warmup and 600,000 total steps. Initialization has a standard deviation of
0.02, divided by √(2 layers) for projections into the residual stream (the paper's N counts these).
Documents are packed, and attention crosses them.

    lm train --config experiments/gpt2.py:124m --workdir runs/gpt2 \
        --config.data.source=jsonl:DIR/*.jsonl.gz --config.data.tokenizer=gpt2:DIR
"""

from lm.config import choose, default, fill

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads optimizer.learning_rate data.batch_size "
    "train.steps"
)
VARIANTS = {
    "124m": ("gpt2-small", 12, 768, 12, 6e-4, 512, 19_560),
    "355m": ("gpt2-medium", 24, 1024, 16, 3e-4, 512, 60_000),
    "774m": ("gpt2-large", 36, 1280, 20, 2.5e-4, 512, 60_000),
    "1558m": ("gpt2-xl", 48, 1600, 25, 6e-4, 1024, 32_000),
    "nanogpt": ("gpt2-small-nanogpt-nobias", 12, 768, 12, 6e-4, 480, 600_000),
}


def get_config(variant="124m"):
    config = default()
    model, data, schedule = config.model, config.data, config.schedule
    fill(config, COLUMNS, choose(VARIANTS, variant))
    model.vocab_size, model.max_length = 50257, 1024

    data.source = "jsonl:openwebtext/*.jsonl.gz"
    data.tokenizer = "gpt2:gpt2_bpe"
    data.validation_fraction = 0.0005
    data.sequence_length = 1024
    data.isolate_documents = False

    config.optimizer.adamw.b2 = 0.95
    schedule.warmup_steps, schedule.final_ratio = 700, 0.0
    config.eval.every_steps, config.eval.max_batches = 250, 20
    if variant == "nanogpt":
        model.vocab_size, model.activation = 50_304, "gelu_erf"
        model.bias = model.norm_bias = False
        schedule.warmup_steps, schedule.final_ratio = 2000, 0.1
    return config
