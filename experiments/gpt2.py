"""GPT-2 (Radford et al. 2019, Table 2), trained by the public 124M recipe.

| variant | layers | d_model | heads | parameters    | paper's count | WikiText-2 (Table 3) |
|---------|--------|---------|-------|---------------|---------------|----------------------|
| 124m    | 12     | 768     | 12    | 124,439,808   | 117M          | 29.41                |
| 355m    | 24     | 1024    | 16    | 354,823,168   | 345M          | 22.76                |
| 774m    | 36     | 1280    | 20    | 774,030,080   | 762M          | 19.93                |
| 1558m   | 48     | 1600    | 25    | 1,557,611,200 | 1542M         | 18.34                |

The paper's counts are wrong by its authors' own word (README of the released code). It publishes
no optimizer, schedule or token count, so the recipe is llm.c's: 19,560 updates of 524,288 tokens
(10B), lr 6e-4 to 0 by a cosine after 700 steps, AdamW (0.9, 0.95), decay 0.1 of matrices, clip
1.0; its 124M reaches a FineWeb validation loss of 3.27. Documents are packed and attention
crosses them, as there.

    lm train --config experiments/gpt2.py:124m --workdir runs/gpt2 \
        --config.data.source=jsonl:DIR/*.jsonl.gz --config.data.tokenizer=gpt2:DIR
"""

from lm.config import choose, default

VARIANTS = {  # paper entry, n_layers, d_model, n_heads, learning rate
    "124m": ("gpt2-small", 12, 768, 12, 6e-4),
    "355m": ("gpt2-medium", 24, 1024, 16, 3e-4),
    "774m": ("gpt2-large", 36, 1280, 20, 2.5e-4),
    "1558m": ("gpt2-xl", 48, 1600, 25, 2e-4),
}


def get_config(variant="124m"):
    paper, n_layers, d_model, n_heads, learning_rate = choose(VARIANTS, variant)
    config = default()
    config.paper = paper

    model = config.model
    model.n_layers, model.d_model, model.n_heads = n_layers, d_model, n_heads
    model.vocab_size, model.max_length = 50257, 1024

    data = config.data
    data.source = "jsonl:openwebtext/*.jsonl.gz"
    data.tokenizer = "gpt2:gpt2_bpe"
    data.validation_fraction = 0.0005
    data.sequence_length, data.batch_size = 1024, 512
    data.isolate_documents = False

    config.train.steps = 19_560
    config.optimizer.learning_rate = learning_rate
    config.optimizer.adamw.b2 = 0.95
    config.schedule.warmup_steps, config.schedule.final_ratio = 700, 0.0
    config.eval.every_steps, config.eval.max_batches = 250, 20
    return config
