"""GPT (Radford et al. 2018, §4.1).

| variant | parameters  | paper's | tokens | FLOPs  | expected              |
|---------|-------------|---------|--------|--------|-----------------------|
| 117m    | 116,534,784 |         | 80B    | 4.1e19 | token perplexity 18.4 |

The perplexity is that of held-out BooksCorpus. The paper gives no parameter count. The 40,478
embedding rows are those of the released tokenizer; the 40,000 merges are the paper's.

Twelve post-norm layers without a final norm, learned positions, tanh-GELU; dropout 0.1 on
embeddings, sublayers and attention; initialization N(0, 0.02²). Adam, lr 2.5e-4 after 2,000
updates, a cosine to 0 over 100 epochs, 64 rows of 512 tokens that cross documents; decoupled weight
decay 0.01, except for biases and gains. Not in the paper and taken from its fine-tuning code:
Adam's (0.9, 0.999), eps 1e-8, clipping at 1. BooksCorpus counts as 800M tokens, its number of words
(Devlin et al. 2018).

    lm train --config experiments/gpt1.py:117m --workdir runs/gpt1 --config.parallel.preset=data \
        --config.data.source=jsonl:DIR/*.jsonl.gz --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default

VARIANTS = {"117m": "gpt-1"}  # paper entry
WORDS, EPOCHS = 800_000_000, 100


def get_config(variant="117m"):
    config = default()
    config.paper = choose(VARIANTS, variant)

    model = config.model
    model.n_layers, model.d_model, model.n_heads = 12, 768, 12
    model.vocab_size, model.max_length = 40_478, 512
    model.norm_placement, model.scale_residual_init = "post", False
    model.dropout = model.attention_dropout = 0.1

    data = config.data
    data.source = "jsonl:books/*.jsonl.gz"
    data.tokenizer = "tokenizers:gpt.json"
    data.validation_fraction = 0.0005
    data.sequence_length, data.batch_size = 512, 64
    data.isolate_documents = False

    optimizer, schedule = config.optimizer, config.schedule
    optimizer.learning_rate, optimizer.weight_decay = 2.5e-4, 0.01
    optimizer.adamw.b2 = 0.999
    schedule.warmup_steps, schedule.final_ratio = 2000, 0.0
    config.train.steps = EPOCHS * WORDS // (data.batch_size * data.sequence_length)
    config.eval.every_steps, config.eval.max_batches = 10_000, 20
    return config
