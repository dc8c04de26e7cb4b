"""DeepSeek-V2 (2024a, §3.1, App. B), DeepSeek-V3 (2024b, §4.2) and Kimi K2 (Kimi Team 2025, §2).

| variant | parameters        | active         | paper's      | tokens | FLOPs  | expected   |
|---------|-------------------|----------------|--------------|--------|--------|------------|
| v2-lite | 15,706,484,224    | 2,661,150,208  | 15.7B, 2.4B  | 5.7T   | 7.7e22 |            |
| v2      | 235,741,434,880   | 21,375,800,320 | 236B, 21B    | 8.1T   | 9.9e23 |            |
| v3      | 671,026,404,352   | 37,552,282,624 | 671B, 37B    | 14.8T  | 3.2e24 |            |
| k2      | 1,026,408,209,408 | 32,861,477,888 | 1.04T, 32.6B | 15.5T  | 2.8e24 |            |
| tiny    |                   |                |              |        |        | for trials |

Sizes are those of the released configurations. The reports' scores were not checked, so none are
listed. V3 is counted without the multi-token prediction module (added by
`--config.objective.name=multi_token`, and not used in decoding) and without the routers' biases,
256 per layer, which are model state rather than parameters.

Llama's block with multi-head latent attention: the keys and values of all heads are projected from
a latent of 512 dimensions. Only this latent and a rotary key of 64 dimensions are cached. After 1
or 3 dense layers come MoE layers with an expert shared by all tokens (V2's two shared experts of
1,408 or 1,536 are one of twice the width). V2 routes by probability, within the 3 of 8 groups with
the best expert. V3 routes by sigmoid plus a load-balancing bias, within the 4 groups whose two best
experts have the largest sum. K2 has no groups.

The recipe is the first stage of pretraining, with rows of 4,096 tokens, for which the YaRN of the
released models is not needed. AdamW (0.9, 0.95), weight decay 0.1, clipping at 1, 2,000 warmup
steps and N(0, 0.006²) are DeepSeek's. The cosine to 10 % is Llama's: V2 decays in steps, and V3 and
K2 hold the rate for 10T tokens. All steps have the largest batch size of the reports. K2 uses
MuonClip instead of AdamW: Muon at Moonlight's scale, with queries and keys scaled down in heads
whose logits exceed 100. The balance loss is the reports' expert-level loss, without V2's
device-level and communication losses.

    lm train --config experiments/deepseek.py:v2-lite --workdir runs/deepseek \\
        --config.parallel.mesh.data=1 --config.parallel.mesh.fsdp=-1 \\
        --config.parallel.mesh.expert=8 --config.data.source=jsonl:DIR/*.jsonl.gz \\
        --config.data.tokenizer=tokenizers:FILE.json
"""

from lm.config import choose, default, fill
from lm.recipes import llama_block, llama_training, trial

SIZES = (
    "paper model.n_layers model.d_model model.n_heads model.q_lora_rank model.d_ff "
    "model.vocab_size optimizer.learning_rate"
)
EXPERTS = (
    "model.n_experts model.experts_per_token model.expert_d_ff model.shared_expert_d_ff "
    "model.dense_layers model.expert_groups model.expert_groups_per_token "
    "model.expert_weights_scale"
)
VARIANTS = {  # values of SIZES and EXPERTS, training tokens, tokens per step
    "tiny": (("", 4, 128, 4, 48, 352, 0, 3e-3), (8, 2, 88, 88, 1, 4, 2, 1.0), 0, 0),
    "v2-lite": (
        ("deepseek-v2-lite", 27, 2048, 16, 0, 10944, 102_400, 4.2e-4),
        (64, 6, 1408, 2816, 1, 0, 0, 1.0),
        5.7e12,
        4608 * 4096,
    ),
    "v2": (
        ("deepseek-v2", 60, 5120, 128, 1536, 12288, 102_400, 2.4e-4),
        (160, 6, 1536, 3072, 1, 8, 3, 16.0),
        8.1e12,
        9216 * 4096,
    ),
    "v3": (
        ("deepseek-v3", 61, 7168, 128, 1536, 18432, 129_280, 2.2e-4),
        (256, 8, 2048, 2048, 3, 8, 4, 2.5),
        14.8e12,
        15_360 * 4096,
    ),
    "k2": (
        ("kimi-k2", 61, 7168, 64, 1536, 18432, 163_840, 2e-4),
        (384, 8, 2048, 2048, 1, 0, 0, 2.827),
        15.5e12,
        16_384 * 4096,
    ),
}


def get_config(variant="v2-lite"):
    sizes, experts, tokens, batch_tokens = choose(VARIANTS, variant)
    config = default()
    model = config.model
    llama_block(config)
    fill(config, SIZES, sizes)
    fill(config, EXPERTS, experts)
    model.mixer, model.rope_interleaved = "mla", True
    model.norm_eps = 1e-6
    if variant.startswith("v2"):
        model.expert_weights = "probability"
        model.balance_loss = 0.001 if variant == "v2-lite" else 0.003
    else:
        model.router_scores, model.router_bias_rate = "sigmoid", 0.001
        model.expert_group_best = 2
        model.balance_loss = 0.0001
    if variant == "tiny":
        model.head_dim, model.qk_nope_head_dim, model.v_head_dim = 16, 32, 32
        model.kv_lora_rank = 32
        trial(config)
        return config

    model.head_dim, model.init_std = 64, 0.006
    model.rope_theta = 5e4 if variant == "k2" else 1e4
    model.max_length = config.data.sequence_length = 4096
    llama_training(config, tokens, batch_tokens)
    config.data.tokenizer = "tokenizers:deepseek.json"
    if variant == "k2":  # MuonClip (§2.1)
        optimizer = config.optimizer
        optimizer.name, optimizer.qk_clip = "muon", 100.0
        optimizer.muon.rms, optimizer.muon.adam_ratio = 0.2, 1.0
    return config
