"""Llama 1, 2 and 3 (Touvron et al. 2023a, Table 2; 2023b; Grattafiori et al. 2024, Table 3).

RMSNorm before each sublayer, rotary positions, SwiGLU, no biases, an untied head (tied in 3.2).
Parameter counts, to the digit, are in `tests/test_experiments.py`. Recipe of Llama 1 and 2:
AdamW (0.9, 0.95), cosine to 10 % after 2,000 steps, decay 0.1, clip 1.0, 4M tokens an update;
7B: lr 3e-4, 1.0T tokens (Llama 1), 2.0T (Llama 2). The papers publish no initialisation: 0.02.
Llama 3.1 and 3.2 stretch the rotary wavelengths beyond 8,192 tokens; here they are trained at
8,192, where the stretching is not needed.

    lm train --config experiments/llama.py:2-7b --workdir runs/llama --config.parallel.preset=fsdp \
        --config.data.source=jsonl:DIR/*.jsonl.gz --config.data.tokenizer=sentencepiece:FILE.model

`tiny` trains on the embedded corpus in a minute; it is for trying things out.
"""

from lm.config import choose, default

# paper entry, layers, d_model, heads, key/value heads, d_ff, vocabulary, context, norm eps, theta,
# tied, learning rate
VARIANTS = {
    "tiny": ("", 4, 128, 4, 2, 352, 0, 256, 1e-5, 1e4, False, 3e-3),
    "1-7b": ("llama-1-7b", 32, 4096, 32, 32, 11008, 32000, 2048, 1e-6, 1e4, False, 3e-4),
    "1-13b": ("llama-1-13b", 40, 5120, 40, 40, 13824, 32000, 2048, 1e-6, 1e4, False, 3e-4),
    "1-33b": ("llama-1-33b", 60, 6656, 52, 52, 17920, 32000, 2048, 1e-6, 1e4, False, 1.5e-4),
    "1-65b": ("llama-1-65b", 80, 8192, 64, 64, 22016, 32000, 2048, 1e-6, 1e4, False, 1.5e-4),
    "2-7b": ("llama-2-7b", 32, 4096, 32, 32, 11008, 32000, 4096, 1e-5, 1e4, False, 3e-4),
    "2-13b": ("llama-2-13b", 40, 5120, 40, 40, 13824, 32000, 4096, 1e-5, 1e4, False, 3e-4),
    "2-70b": ("llama-2-70b", 80, 8192, 64, 8, 28672, 32000, 4096, 1e-5, 1e4, False, 1.5e-4),
    "3-8b": ("llama-3-8b", 32, 4096, 32, 8, 14336, 128256, 8192, 1e-5, 5e5, False, 3e-4),
    "3-70b": ("llama-3-70b", 80, 8192, 64, 8, 28672, 128256, 8192, 1e-5, 5e5, False, 1.5e-4),
    "3.1-405b": ("llama-3.1-405b", 126, 16384, 128, 8, 53248, 128256, 8192, 1e-5, 5e5, False, 8e-5),
    "3.2-1b": ("llama-3.2-1b", 16, 2048, 32, 8, 8192, 128256, 8192, 1e-5, 5e5, True, 3e-4),
    "3.2-3b": ("llama-3.2-3b", 28, 3072, 24, 8, 8192, 128256, 8192, 1e-5, 5e5, True, 3e-4),
}


def get_config(variant="2-7b"):
    config = default()
    model, data = config.model, config.data
    (
        config.paper,
        model.n_layers,
        model.d_model,
        model.n_heads,
        model.n_kv_heads,
        model.d_ff,
        model.vocab_size,
        data.sequence_length,
        model.norm_eps,
        model.rope_theta,
        model.tie_embeddings,
        config.optimizer.learning_rate,
    ) = choose(VARIANTS, variant)
    model.norm, model.positions, model.activation = "rmsnorm", "rotary", "swiglu"
    model.bias = model.norm_bias = model.scale_residual_init = False
    config.optimizer.adamw.b2 = 0.95

    if variant == "tiny":
        data.batch_size = 16
        config.train.steps, config.train.scan_unroll = 500, 0
        config.schedule.warmup_steps = 50
        return config

    data.source = "jsonl:corpus/*.jsonl.gz"
    data.tokenizer = "sentencepiece:tokenizer.model"
    data.validation_fraction = 0.0005
    data.batch_size = 4_194_304 // data.sequence_length
    config.train.steps, config.train.remat = 500_000, "full"  # 2T tokens
    config.train.loss_chunk = 512  # whole, the logits would be the largest arrays of the step
    config.schedule.warmup_steps = 2000
    config.eval.every_steps, config.eval.max_batches = 1000, 10
    return config
