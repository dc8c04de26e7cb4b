"""Small configurations with the same structure, for checks of many experiments."""

from __future__ import annotations

from math import lcm
from pathlib import Path

from ml_collections import ConfigDict

from lm.config import SCHEMA, set_value
from lm.config.registries import OBJECTIVES

# Largest values of size keys; smaller ones are kept, and so is 0, which means a default.
LARGEST = {
    **{"model.d_ff": 48, "model.vocab_size": 128, "model.max_length": 32, "model.window": 6},
    **{"model.expert_d_ff": 16, "model.experts_per_token": 2},
    **{"model.dense_layers": 1, "model.generator_layers": 1, "model.embedding_size": 8},
    **{"model.d_hidden": 16, "model.concat_width": 8, "model.relative_buckets": 8},
    **{"model.relative_max_distance": 12, "model.rope_original_length": 8},
    **{"model.nope_temperature_length": 8, "model.q_lora_rank": 24, "model.kv_lora_rank": 16},
    **{"model.qk_nope_head_dim": 16, "model.v_head_dim": 16, "model.ssm_heads": 4},
    **{"model.ssm_head_dim": 8, "model.ssm_state": 16, "model.ssm_chunk": 8, "model.ssm_groups": 2},
    **{"data.sequence_length": 32, "data.target_length": 16},
    **{"data.stride": 8, "data.doc_stride": 4, "data.tokenizer_min_count": 1},
    **{"schedule.warmup_steps": 2, "schedule.hold_steps": 1, "schedule.step_every": 2},
    **{"train.loss_chunk": 8, "train.microbatches": 2, "train.steps_per_dispatch": 3},
    **{"lora.rank": 4, "checkpoint.keep_last": 2},
}
# Keys that name missing files, or compare with other runs: set to defaults.
RESET = (
    *("paper", "data.columns", "data.header", "data.test_source", "data.tokenizer_vocab_size"),
    *("data.bad_rows", "init.from", "init.fresh", "init.leave", "init.rename", "init.vectors"),
    *("eval.every_steps", "eval.max_batches", "eval.metrics", "eval.best", "decode.beam_size"),
    *("schedule.decay_steps", "data.documents", "data.validation_source", "data.weights"),
    *("data.schedule", "data.epochs", "data.target_prefix", "log.every_steps"),
)
SOURCES = {  # by objective; documents elsewhere
    "seq2seq": "parallel:{}/numbers.en|{}/numbers.de",
    "transcription": "audio:{}/tones.jsonl",
    "classification": "tsv:{}/labels.tsv",
    "span_qa": "squad:{}/squad.json",
    "chat": "jsonl:{}/chat.jsonl",
    "dpo": "jsonl:{}/pairs.jsonl",
}


def shrunk(config: ConfigDict, data: Path, steps: int) -> ConfigDict:
    """Return a configuration with the same structure whose model is small, in float32.

    Types and order of layers and divisibility are kept: grouped heads stay grouped, a
    head as wide as d_model / n_heads stays so, and each kind of layer occurs at least twice.

    Args:
        config: configuration of an experiment.
        data: folder of the corpora written by `write_data` (`scripts/proof_of_value.py`).
        steps: training steps, with two evaluations.
    """
    small = config.copy_and_resolve_references()
    for path in RESET:
        set_value(small, path, SCHEMA[path].default)
    for path, largest in LARGEST.items():
        section, name = path.split(".")
        small[section][name] = min(small[section][name], largest)
    _shrink_heads(small.model)
    _shrink_depth(small.model)
    if small.model.expert_groups:
        small.model.n_experts, small.model.expert_groups = 8, 4
        small.model.expert_groups_per_token = min(2, small.model.expert_groups_per_token)
    small.model.n_experts = min(small.model.n_experts, 8 if small.model.expert_groups else 4)
    if whole := config.model.shared_expert_d_ff:  # of one expert's width, or of two
        width = small.model.expert_d_ff or small.model.d_ff
        own = config.model.expert_d_ff or config.model.d_ff
        small.model.shared_expert_d_ff = width * min(2, max(1, whole // own))
    if config.model.generator_width:
        small.model.generator_width = small.model.d_model // 2
    objective = small.objective.name
    source = SOURCES.get(objective, "text:{}/text.txt").replace("{}", str(data))
    assert source.startswith("text") != bool(OBJECTIVES.entries[objective].columns)
    values = {
        "model.dtype": "float32",
        "data.source": source,
        "data.documents": "line",
        "data.labels": "good,bad" if small.data.labels else "",
        "data.validation_fraction": 0.2,
        "data.tokenizer": small.data.tokenizer if small.data.tokenizer == "char" else "words",
        "data.workers": 1,
        "data.batch_size": 8,
        "eval.batch_size": 8,
        "decode.max_length": 8,
        "train.steps": steps,
        "eval.every_steps": steps // 2,
        "checkpoint.every_steps": steps // 2,
        "log.tensorboard": False,
    }
    for path, value in values.items():
        set_value(small, path, value)
    return small


def _shrink_heads(model: ConfigDict) -> None:
    """Set two or four heads of 8 numbers; two of them share keys if some did."""
    heads, own_width = model.n_heads, model.head_dim * model.n_heads not in (0, model.d_model)
    if model.n_kv_heads not in (0, heads):
        model.n_kv_heads = min(2, model.n_kv_heads)
        model.n_heads = 2 * model.n_kv_heads
    else:
        model.n_heads = min(4, heads)
        model.n_kv_heads = model.n_kv_heads and model.n_heads
    model.head_dim = model.head_dim and 8
    model.d_model = 8 * model.n_heads + 16 * own_width


def _shrink_depth(model: ConfigDict) -> None:
    """Set two periods of layers after the dense ones, plus the remainder of a period."""
    every = (model.experts_every, model.global_every, model.nope_every)
    period = lcm(*(n or 1 for n in every))
    for name in ("n_layers", "n_decoder_layers"):
        n = model[name] - model.dense_layers
        if model[name]:
            model[name] = min(model[name], model.dense_layers + 2 * period + n % period)
    if model.attention_layers:
        n = min(3, len(model.attention_layers))
        model.n_layers, model.attention_layers = 2 * n + 1, tuple(range(2, 2 * n + 1, 2))
