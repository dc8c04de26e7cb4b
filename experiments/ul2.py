"""UL2 (Tay et al. 2022): T5 with a mixture of denoisers, each with its prefix.

| variant | parameters     | paper's | tokens | FLOPs  | expected                         |
|---------|----------------|---------|--------|--------|----------------------------------|
| 20b     | 19,591,209,984 | 20B     | 1.74T  | 1.0e23 | SuperGLUE 90.7 after fine-tuning |

The score (§4.3) and the recipe are from memory, not checked against the paper.

T5 1.1's block with SwiGLU and 16 heads of 256. One of seven denoisers is drawn for each text
(§3.1.2, Table 1). R removes 15 % in spans of 3 or 8 tokens; S removes the end of the text, a
quarter on average; X removes half of the text in spans of 3, 8 or 64 tokens, or 15 % in spans of
64. Their prefixes are the release's: [NLU], [S2S] and [NLG]. 1,024 sequences of up to 512
tokens, 2,000,000 updates with T5's Adafactor.

    lm train --config experiments/ul2.py:20b --workdir runs/ul2 --config.parallel.preset=fsdp \
        --config.data.source=jsonl:DIR/*.jsonl.gz --config.data.tokenizer=sentencepiece:FILE.model
"""

from lm.config import choose, default
from lm.recipes import t5_block, t5_training

VARIANTS = {"20b": ("ul2-20b", 32, 4096, 16, 16_384)}  # as of t5.py


def get_config(variant="20b"):
    config = default()
    model, data = config.model, config.data
    t5_block(config)
    config.paper, model.n_layers, model.d_model, model.n_heads, model.d_ff = choose(
        VARIANTS, variant
    )
    model.vocab_size, model.head_dim, model.activation = 32_128, 256, "swiglu"
    t5_training(config)
    config.objective.denoisers = "ul2"
    data.sequence_length, data.batch_size = 512, 1024
    config.train.steps, config.train.remat = 2_000_000, "full"
    return config
