"""Settings shared by experiments: Llama and T5 blocks and training, and a short trial run."""

from __future__ import annotations

from ml_collections import ConfigDict


def llama_block(config: ConfigDict) -> None:
    """Set the block of Llama (Touvron et al. 2023a, §2.2).

    RMSNorm before each sublayer, rotary positions, SwiGLU, no biases, untied output matrix. The
    papers do not state an initialization: N(0, 0.02²).
    """
    model = config.model
    model.norm, model.positions, model.activation = "rmsnorm", "rotary", "swiglu"
    model.bias = model.norm_bias = model.scale_residual_init = model.tie_embeddings = False


def llama_training(config: ConfigDict, tokens: float, batch_tokens: int = 2**22) -> None:
    """Set the training of Llama (Touvron et al. 2023a, §2.3; 2023b, §2.2).

    AdamW (0.9, 0.95), weight decay 0.1, clipping at 1, a cosine to 10 % after 2,000 steps of
    warm-up.

    Args:
        config: configuration to change.
        tokens: total number of training tokens.
        batch_tokens: tokens per step.
    """
    config.optimizer.adamw.b2 = 0.95
    config.optimizer.weight_decay, config.optimizer.clip_norm = 0.1, 1.0
    config.schedule.warmup_steps, config.schedule.final_ratio = 2000, 0.1
    data = config.data
    data.source = "jsonl:corpus/*.jsonl.gz"
    data.tokenizer = "sentencepiece:tokenizer.model"
    data.validation_fraction = 0.0005
    data.batch_size = batch_tokens // data.sequence_length
    config.train.steps, config.train.remat = round(tokens / batch_tokens), "full"
    config.train.loss_chunk = 512  # unchunked logits would be the largest arrays of the step
    config.eval.every_steps, config.eval.max_batches = 1000, 10


def t5_block(config: ConfigDict) -> None:
    """Set the block of T5 1.1 (Raffel et al. 2020, §2.1; Shazeer 2020).

    RMSNorm before each sublayer, no biases, heads of width 64 with unscaled scores, 32 relative
    positions shared by all layers of a stack, a gated tanh-GELU, an untied output
    matrix.
    """
    model = config.model
    model.family, model.head_dim = "encoder_decoder", 64
    model.norm, model.norm_eps, model.bias = "rmsnorm", 1e-6, False
    model.positions, model.attention_scale = "relative", 1.0
    model.activation, model.tie_embeddings, model.final_dropout = "geglu", False, True
    model.init, model.init_std, model.scale_residual_init = "fan_in", 1.0, False


def t5_training(config: ConfigDict) -> None:
    """Set the pretraining of T5 (Raffel et al. 2020, §3.1): spans, Adafactor, lr 1/√max(t, 10⁴)."""
    config.objective.name, config.objective.z_loss = "span_corruption", 1e-4
    config.data.source = "jsonl:c4/*.jsonl.gz"
    config.data.tokenizer = "sentencepiece:t5.model"
    config.data.validation_fraction = 0.0005
    config.optimizer.name, config.optimizer.learning_rate = "adafactor", 0.01
    config.optimizer.weight_decay = config.optimizer.clip_norm = 0.0
    config.schedule.name, config.schedule.hold_steps = "inverse_sqrt", 10_000
    config.train.steps = 1_000_000
    config.eval.every_steps, config.eval.batch_size, config.eval.max_batches = 5000, 256, 20
    config.decode.beam_size, config.decode.length_penalty = 4, 0.6


def trial(config: ConfigDict) -> None:
    """Set a training run of a few minutes on the source code of Python's standard library."""
    config.optimizer.adamw.b2 = 0.95
    config.data.sequence_length, config.data.batch_size = 256, 16
    config.schedule.warmup_steps = 50
    config.train.steps, config.train.scan_unroll = 500, 0
