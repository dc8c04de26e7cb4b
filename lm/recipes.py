"""Settings that the experiments of Llama and its successors share."""

from __future__ import annotations

from ml_collections import ConfigDict


def llama_block(config: ConfigDict) -> None:
    """Set the block of Llama (Touvron et al. 2023a, §2.2).

    RMSNorm before each sublayer, rotary positions, SwiGLU, no biases, an untied output matrix. The
    papers give no initialization: N(0, 0.02²).
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
        tokens: tokens of the whole training.
        batch_tokens: tokens of a step.
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
    config.train.loss_chunk = 512  # whole, the logits would be the largest arrays of the step
    config.eval.every_steps, config.eval.max_batches = 1000, 10


def trial(config: ConfigDict) -> None:
    """Set a training of minutes on the standard library's source code."""
    config.optimizer.adamw.b2 = 0.95
    config.data.sequence_length, config.data.batch_size = 256, 16
    config.schedule.warmup_steps = 50
    config.train.steps, config.train.scan_unroll = 500, 0
