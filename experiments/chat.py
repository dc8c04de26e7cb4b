"""Instruction tuning: the quickstart model learns to answer.

| variant  | trained parameters                                          | steps |
|----------|-------------------------------------------------------------|-------|
| full     | all parameters                                              | 300   |
| lora     | token embeddings, and rank-16 LoRA of all matrices          | 300   |
| lora8    | the same, with an 8-bit base model                          | 300   |
| dpo      | all parameters, on pairs of a better and a worse answer     | 125   |
| tiny     | all parameters of the tiny variant of stdlib.py             | 60    |

Conversations are packed into rows of 512 tokens. Longer ones are truncated after an assistant turn
or dropped; `lm data show` prints the counts. Data: 8,354 short examples of T0's training mixture,
as prompts and completions, and 930 for validation, in the folder `instruct` under $LM_DATA_DIR;
from yizhongw/self-instruct. RESULTS.md has the results.

    scripts/quickstart.sh runs/quickstart
    LM_DATA_DIR=DIR lm train --config experiments/chat.py --workdir runs/chat \\
        --config.init.from=runs/quickstart --config.data.tokenizer=run:runs/quickstart
    LM_DATA_DIR=DIR lm eval --workdir runs/chat --task
"""

from lm.config import choose, default

VARIANTS = {  # layers, d_model, heads, steps
    "full": (4, 192, 6, 300),
    "lora": (4, 192, 6, 300),
    "lora8": (4, 192, 6, 300),
    "dpo": (4, 192, 6, 125),
    "tiny": (2, 64, 4, 60),
}


def get_config(variant="full"):
    n_layers, d_model, n_heads, steps = choose(VARIANTS, variant)
    config = default()

    model = config.model  # as in stdlib.py
    model.n_layers, model.d_model, model.n_heads = n_layers, d_model, n_heads
    model.norm, model.positions, model.activation = "rmsnorm", "rotary", "gelu_tanh"
    model.bias = model.norm_bias = False

    config.objective.name = "chat"
    data = config.data
    data.source = "jsonl:instruct/t0_short_train.jsonl.gz"
    data.validation_source = "jsonl:instruct/t0_short_dev.jsonl.gz"
    data.tokenizer, data.tokenizer_vocab_size = "sentencepiece", 4096
    data.sequence_length, data.batch_size = 512, 8

    if variant.startswith("lora"):
        config.lora.rank, config.lora.alpha = 16, 32.0
        config.lora.targets = "layers/.*kernel"
        config.lora.base = "int8" if variant == "lora8" else "float32"
        config.lora.train = "^tokens/"  # new tokens mark the turns

    if variant == "dpo":  # pairs as `scripts/reproduce.sh dialogue` makes them
        config.objective.name = "dpo"
        data.source = "jsonl:instruct/pairs_train.jsonl"
        data.validation_source = "jsonl:instruct/pairs_dev.jsonl"
        data.sequence_length = 256

    config.train.steps = steps
    config.train.scan_unroll, config.train.steps_per_dispatch = 0, 5
    config.optimizer.learning_rate = 1e-4 if variant == "dpo" else 1e-3
    config.optimizer.weight_decay = 0.0
    config.schedule.name, config.schedule.final_ratio = "linear", 0.0
    config.schedule.warmup_steps = steps // 20
    config.eval.every_steps = steps // 3
    config.decode.max_length = 64
    return config
