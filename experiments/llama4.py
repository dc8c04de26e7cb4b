"""Llama 4 Scout and Maverick (Meta 2025, released configurations), text only.

| variant  | parameters      | active         | paper's   | tokens | FLOPs  | expected   |
|----------|-----------------|----------------|-----------|--------|--------|------------|
| scout    | 107,769,861,120 | 17,172,894,720 | 109B, 17B | 40T    | 3.6e24 |            |
| maverick | 400,711,848,960 | 17,184,691,200 | 400B, 17B | 22T    | 2.0e24 |            |
| tiny     |                 |                |           |        |        | for trials |

Token counts are the model cards' and include images and video. Scores were not checked, so none are
listed. Both models are without the vision encoder. Learning rates and batch sizes are not
published: they are Llama 2's, with 3e-4. Rows have 8,192 tokens here.

In three of four layers, a token attends within its chunk of 8,192 tokens, and Scout normalizes
queries and keys after RoPE. Every fourth layer is global, has no positions (NoPE), and scales up
queries beyond 8,192 tokens. Each token uses a shared expert and one of 16 (Scout) or, in every
other layer, 128 (Maverick). The expert's input is multiplied by the sigmoid of its router logit.
Maverick's dense layers are twice as wide. Scout scales RoPE by 16.

    lm train --config experiments/llama4.py:scout --workdir runs/llama4 \\
        --config.parallel.mesh.data=1 --config.parallel.mesh.fsdp=-1 \\
        --config.parallel.mesh.expert=8 --config.data.source=jsonl:DIR/*.jsonl.gz \\
        --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default, fill
from lm.recipes import llama_block, llama_training, trial

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads model.n_kv_heads model.head_dim model.d_ff "
    "model.expert_d_ff model.shared_expert_d_ff model.vocab_size model.n_experts "
    "model.experts_every model.window"
)
_SIZES = (48, 5120, 40, 8, 128, 16384, 8192, 8192, 202_048)
VARIANTS = {  # values of COLUMNS, training tokens
    "tiny": (("", 4, 128, 4, 2, 32, 352, 176, 176, 0, 4, 2, 64), 0),
    "scout": (("llama-4-scout", *_SIZES, 16, 1, 8192), 40e12),
    "maverick": (("llama-4-maverick", *_SIZES, 128, 2, 8192), 22e12),
}


def get_config(variant="scout"):
    row, tokens = choose(VARIANTS, variant)
    config = default()
    model = config.model
    llama_block(config)
    fill(config, COLUMNS, row)
    model.window_chunks, model.global_every, model.nope_every = True, 4, 4
    model.nope_temperature, model.nope_temperature_length = 0.1, model.window
    model.experts_per_token, model.router_scores = 1, "sigmoid"
    model.expert_weights_input, model.balance_loss = True, 0.001
    model.rope_norm = variant != "maverick"
    config.optimizer.learning_rate = 3e-4
    if variant == "tiny":
        config.optimizer.learning_rate = 3e-3
        trial(config)
        return config

    model.rope_theta, model.max_length = 5e5, 262_144
    if variant == "scout":
        model.rope_scaling, model.rope_factor = "llama3", 16.0
        model.rope_high_frequency = 1.0
    config.data.sequence_length = 8192
    llama_training(config, tokens)
    config.data.tokenizer = "tokenizers:llama4.json"
    return config
