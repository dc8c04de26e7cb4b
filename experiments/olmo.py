"""OLMo 2 (OLMo Team 2024, Table 1), OLMo 3 (2025) and OLMoE (Muennighoff et al. 2024, Table 1).

| variant | parameters     | active         | paper's | tokens | FLOPs  | expected |
|---------|----------------|----------------|---------|--------|--------|----------|
| 2-1b    | 1,484,916,736  | 1,484,916,736  | 1B      | 4T     | 2.6e22 |          |
| 2-7b    | 7,298,617,344  | 7,298,617,344  | 7B      | 4T     | 1.6e23 |          |
| 2-13b   | 13,716,198,400 | 13,716,198,400 | 13B     | 5T     | 3.8e23 |          |
| 2-32b   | 32,234,279,936 | 32,234,279,936 | 32B     | 6T     | 1.1e24 |          |
| 3-7b    | 7,298,011,136  | 7,298,011,136  | 7B      | 5.93T  | 2.3e23 |          |
| 3-32b   | 32,233,522,176 | 32,233,522,176 | 32B     | 5.5T   | 1.0e24 |          |
| e-1b-7b | 6,919,161,856  | 1,282,017,280  | 6.9B    | 5.1T   | 3.3e22 |          |

Sizes are those of the released configurations. Learning rates, batch sizes and token counts are
those of the first stage of pretraining, without mid-training. Neither they nor the scores were
checked against the reports, so no scores are listed. The schedule is Llama 2's.

OLMo 2 applies RMSNorm to sublayer outputs before the residual sum, and to queries and keys over all
heads together; RoPE base 500,000. In OLMo 3, three of four layers have a sliding window of 4,096
tokens; released models extend the others by YaRN from 8,192 to 65,536 tokens, and are defined with
it. OLMoE is a Llama with the same query and key norms: each token uses 8 of 64 experts, weighted by
their probabilities among all. Its balance loss, 0.01, and router z-loss, 0.001, are averaged over
layers in the paper and summed here.

    lm train --config experiments/olmo.py:2-1b --workdir runs/olmo --config.parallel.preset=fsdp \
        --config.data.source=jsonl:DIR/*.jsonl.gz --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default, fill
from lm.recipes import llama_block, llama_training

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads model.n_kv_heads model.d_ff "
    "model.vocab_size data.sequence_length optimizer.learning_rate"
)
VARIANTS = {  # values of COLUMNS, training tokens, tokens per step
    "2-1b": (("olmo-2-1b", 16, 2048, 16, 16, 8192, 100_352, 4096, 4e-4), 4e12, 2**21),
    "2-7b": (("olmo-2-7b", 32, 4096, 32, 32, 11008, 100_352, 4096, 3e-4), 4e12, 2**22),
    "2-13b": (("olmo-2-13b", 40, 5120, 40, 40, 13824, 100_352, 4096, 9e-4), 5e12, 2**23),
    "2-32b": (("olmo-2-32b", 64, 5120, 40, 8, 27648, 100_352, 4096, 6e-4), 6e12, 2**23),
    "3-7b": (("olmo-3-7b", 32, 4096, 32, 32, 11008, 100_278, 8192, 3e-4), 5.93e12, 2**22),
    "3-32b": (("olmo-3-32b", 64, 5120, 40, 8, 27648, 100_278, 8192, 6e-4), 5.5e12, 2**23),
    "e-1b-7b": (("olmoe-1b-7b", 16, 2048, 16, 16, 1024, 50_304, 4096, 4e-4), 5.1e12, 2**22),
}


def get_config(variant="2-1b"):
    row, tokens, batch_tokens = choose(VARIANTS, variant)
    config = default()
    model = config.model
    llama_block(config)
    fill(config, COLUMNS, row)
    model.qk_norm, model.qk_norm_over = True, "all"
    if variant == "e-1b-7b":
        model.n_experts, model.experts_per_token = 64, 8
        model.expert_weights = "probability"
        model.balance_loss, model.router_z_loss = 0.01 / model.n_layers, 0.001 / model.n_layers
    else:
        model.norm_placement, model.rope_theta, model.norm_eps = "output", 5e5, 1e-6
    if variant.startswith("3"):
        model.window, model.global_every, model.max_length = 4096, 4, 65_536
        model.rope_theta_local, model.rope_scaling, model.rope_factor = 5e5, "yarn", 8.0
        model.rope_high_frequency = 32.0
    llama_training(config, tokens, batch_tokens)
    config.objective.z_loss = 1e-5
    config.data.tokenizer = "tokenizers:olmo.json"
    return config
