"""Gemma 1, 2 and 3 (Gemma Team 2024a, Tables 1 and 2; 2024b, Table 1; 2025, Table 1), text only.

| variant | parameters    | paper's | tokens | FLOPs  | expected       |
|---------|---------------|---------|--------|--------|----------------|
| 1-2b    | 2,506,172,416 | 2.51B   | 3T     | 3.6e22 | MMLU 42.3      |
| 1-7b    | 8,537,680,896 | 8.54B   | 6T     | 2.8e23 | MMLU 64.3      |
| 2-2b    | 2,614,341,888 | 2.6B    | 2T     | 2.4e22 | MMLU 51.3      |
| 2-9b    | 9,241,705,984 | 9B      | 8T     | 4.0e23 | MMLU 71.3      |
| 3-270m  | 268,098,176   | 270M    | 6T     | 3.6e21 | HellaSwag 40.9 |
| 3-1b    | 999,885,952   | 1B      | 2T     | 8.4e21 | HellaSwag 62.3 |
| 3-4b    | 3,880,263,168 | 4B      | 4T     | 7.7e22 | MMLU 59.6      |

Scores (MMLU 5-shot, HellaSwag 10-shot) and token counts are from the model cards. Gemma 2's 2B and
9B and all of Gemma 3 were distilled from a larger model; here they train on text alone and will
score lower. Learning rates, batch sizes and schedules are not published: they are Llama 2's, with
3e-4.

Gemma 1's report counts 256,128 embedding rows (524,550,144 and 786,825,216 parameters), but 256,000
were released; the remaining parameters match exactly. In Gemma 2's report, d_ff counts both halves
of the gated layer. 3-4b is without the vision encoder (417M).

RMSNorm with a scale of 1 + w, embeddings times √d, GeGLU, head dim 256. Gemma 2 normalizes before
and after each sublayer, soft-caps attention logits at 50 and output logits at 30, and has a sliding
window of 4,096 tokens in every other layer. Gemma 3 normalizes queries and keys instead of capping.
Five of six layers have a window of 512 (3-4b: 1,024) tokens and RoPE of base 10⁴; the sixth is
global, with base 10⁶ (3-4b: scaled by 8).

    lm train --config experiments/gemma.py:3-270m --workdir runs/gemma \
        --config.parallel.preset=fsdp --config.data.source=jsonl:DIR/*.jsonl.gz \
        --config.data.tokenizer=sentencepiece:FILE.model
"""

from lm.config import choose, default, fill
from lm.recipes import llama_block, llama_training

COLUMNS = (
    "paper model.n_layers model.d_model model.n_heads model.n_kv_heads model.d_ff "
    "model.vocab_size data.sequence_length model.window"
)
VARIANTS = {  # values of COLUMNS, training tokens
    "1-2b": (("gemma-2b", 18, 2048, 8, 1, 16384, 256_000, 8192, 0), 3e12),
    "1-7b": (("gemma-7b", 28, 3072, 16, 16, 24576, 256_000, 8192, 0), 6e12),
    "2-2b": (("gemma-2-2b", 26, 2304, 8, 4, 9216, 256_000, 8192, 4096), 2e12),
    "2-9b": (("gemma-2-9b", 42, 3584, 16, 8, 14336, 256_000, 8192, 4096), 8e12),
    "3-270m": (("gemma-3-270m", 18, 640, 4, 1, 2048, 262_144, 32_768, 512), 6e12),
    "3-1b": (("gemma-3-1b", 26, 1152, 4, 1, 6912, 262_144, 32_768, 512), 2e12),
    "3-4b": (("gemma-3-4b-text", 34, 2560, 8, 4, 10240, 262_208, 32_768, 1024), 4e12),
}


def get_config(variant="3-270m"):
    row, tokens = choose(VARIANTS, variant)
    config = default()
    model = config.model
    llama_block(config)
    fill(config, COLUMNS, row)
    model.head_dim, model.activation, model.norm_eps = 256, "geglu", 1e-6
    model.norm_unit_offset = model.scale_embeddings = model.tie_embeddings = True
    generation = variant[0]
    if generation != "1":
        model.norm_placement = "both"
    if generation == "2":
        model.global_every, model.attention_softcap, model.logit_softcap = 2, 50.0, 30.0
    if generation == "3":
        model.global_every, model.qk_norm = 6, True
        model.rope_theta, model.rope_theta_local = 1e6, 1e4
    if variant == "3-4b":
        model.max_length = 131_072
        model.rope_scaling, model.rope_factor = "linear", 8.0
    config.optimizer.learning_rate = 3e-4
    llama_training(config, tokens)
    return config
