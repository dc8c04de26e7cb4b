"""Validation rules between configuration keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ml_collections import ConfigDict

from lm.config.registries import MODELS, OBJECTIVES, SCHEMA, SOURCES, TOKENIZERS, TRANSFORMERS
from lm.config.registry import Registry, listed

# Values of --config.model.positions that add a bias to attention scores.
POSITION_BIASES = ("relative", "alibi", "disentangled")
# Keys that trigger `further_rules.py` and `model_rules.py` when they are not at their defaults, and
# keys that hold regular expressions.
FURTHER_KEYS = (
    *("eval.metrics", "eval.safety", "eval.best", "log.trackers", "train.precision", "data.labels"),
    *("train.profile", "data.canaries", "data.batch_ramp", "data.length_ramp", "optimizer.qk_clip"),
)
FURTHER_MODEL_KEYS = (
    *("family", "bidirectional", "pooling", "init", "init_truncated", "residual", "rope_scaling"),
    *("n_experts", "dense_layers", "window", "global_every", "rope_theta_local", "mixer"),
    *("mup_base_width", "mup_base_head_dim", "window_chunks", "attention_sinks", "rope_fraction"),
    *("residual_multiplier", "embedding_multiplier", "logits_scaling", "value_residual", "n_mels"),
    *("first_norm", "embedding_size", "generator_width", "attention_layers", "feed_forward"),
    *("nope_layers", "expert_layers", "global_layers", "n_encoder_heads", "attention_gate"),
)
PATTERN_KEYS = ("optimizer.freeze", "lora.targets", "lora.train", "init.fresh", "init.leave")


def broken_rules(config: ConfigDict) -> Iterator[str]:
    """Yield an error message for each violated rule; each value must already be valid by itself."""
    for rules in RULES:
        yield from rules(config)


def _changed(config: ConfigDict, keys: Iterable[str]) -> bool:
    """Return whether any of these keys differs from its default."""
    parts = ((key, *key.split(".")) for key in keys)
    return any(config[section][name] != SCHEMA[key].default for key, section, name in parts)


def families_of(objective: str) -> tuple[str, ...]:
    """Return the model families that an objective can train."""
    further = (name for name, entry in MODELS.entries.items() if objective in entry.objectives)
    return tuple(dict.fromkeys((*OBJECTIVES.entries[objective].families, *further)))


def _family_rules(config: ConfigDict) -> Iterator[str]:
    families = families_of(config.objective.name)
    if config.model.family not in families:
        yield (
            f"--config.objective.name={config.objective.name} needs --config.model.family "
            f"{' or '.join(families)}, not {config.model.family}"
        )


def _training_rules(config: ConfigDict) -> Iterator[str]:
    if _changed(config, FURTHER_KEYS) or config.optimizer.name == "schedule_free":
        from lm.config.further_rules import further_problems

        yield from further_problems(config)
    if config.init.vectors and config.init["from"]:
        yield "--config.init.from and --config.init.vectors are mutually exclusive"
    if config.schedule.name == "inverse" and not config.schedule.final_ratio:
        yield "--config.schedule.name=inverse never reaches 0: raise --config.schedule.final_ratio"
    sizes = list(config.parallel.mesh.values())
    if 0 in sizes or sizes.count(-1) > 1:
        yield "--config.parallel.mesh: sizes must be 1 or more, and at most one may be -1"


def _decoding_rules(config: ConfigDict) -> Iterator[str]:
    data, decode = config.data, config.decode
    longest = decode.max_length or data.target_length or data.sequence_length
    if decode.min_length > longest:
        yield (
            f"--config.decode.min_length={decode.min_length} is above "
            f"--config.decode.max_length={longest}"
        )


def _model_rules(config: ConfigDict) -> Iterator[str]:
    model = config.model
    transformer = model.family in TRANSFORMERS
    if transformer and not model.head_dim and model.d_model % model.n_heads:
        yield (
            f"--config.model.d_model={model.d_model} is not divisible by "
            f"--config.model.n_heads={model.n_heads}; change one, or set --config.model.head_dim"
        )
    if model.n_kv_heads and model.n_heads % model.n_kv_heads:
        yield (
            f"--config.model.n_heads={model.n_heads} is not divisible by "
            f"--config.model.n_kv_heads={model.n_kv_heads}"
        )
    if (
        transformer
        and model.positions == "rotary"
        and (model.head_dim or model.d_model // model.n_heads) % 2
    ):
        yield "--config.model.positions=rotary needs an even head dimension"
    changed = _changed(config, (f"model.{name}" for name in FURTHER_MODEL_KEYS))
    if changed or model.positions in ("relative", "sinusoidal", "disentangled"):
        from lm.config.model_rules import model_problems

        yield from model_problems(config)
    problem = tiled_attention_problem(config)
    if model.attention == "tiled" and problem:
        yield f"--config.model.attention=tiled cannot be used with {problem}: use auto or xla"


def _pattern_rules(config: ConfigDict) -> Iterator[str]:
    if _changed(config, (*PATTERN_KEYS, "init.rename", "optimizer.rates")):
        from lm.config.patterns import pattern_problems

        yield from pattern_problems(config, PATTERN_KEYS)
    if config.lora.rank and not listed(config.lora.targets):
        yield "--config.lora.targets is empty: name kernels, such as attention/query"


def _data_rules(config: ConfigDict) -> Iterator[str]:
    model, data, train = config.model, config.data, config.train
    if model.carry and (data.order != "contiguous" or model.family != "lstm"):
        yield (
            "--config.model.carry needs --config.data.order=contiguous and "
            "--config.model.family=lstm"
        )
    objective = OBJECTIVES.entries[config.objective.name]
    if data.order == "contiguous" and not objective.predicts_every_token:
        yield "--config.data.order=contiguous needs --config.objective.name=causal"
    if data.order == "contiguous" and len(data.source.split(",")) > 1:
        yield "--config.data.order=contiguous reads a single source"
    of_source = "max_source_length" if model.n_mels else "max_length"
    for name, limit in (("sequence_length", of_source), ("target_length", "max_length")):
        if model[limit] and data[name] > model[limit]:
            yield (
                f"--config.data.{name}={data[name]} is longer than "
                f"--config.model.{limit}={model[limit]}"
            )
    if data.batch_size % train.microbatches:
        yield (
            f"--config.data.batch_size={data.batch_size} is not divisible by "
            f"--config.train.microbatches={train.microbatches}"
        )
    if data.weights or data.schedule or data.epochs:
        from lm.config.mixture_rules import mixture_problems

        yield from mixture_problems(data)


def _source_rules(config: ConfigDict) -> Iterator[str]:
    for key in ("source", "validation_source", "test_source"):
        for spec in listed(config.data[key]):
            if problem := spec_problem(SOURCES, spec):
                yield f"--config.data.{key}: {problem}"
    if problem := spec_problem(TOKENIZERS, config.data.tokenizer):
        yield f"--config.data.tokenizer: {problem}"


def data_problems(config: ConfigDict) -> Iterator[str]:
    """Yield an error message for each invalid data source of a configuration that will read data.

    Kept apart from `broken_rules`: a model can be planned or exported without data.
    """
    needed = "records" if OBJECTIVES.entries[config.objective.name].columns else "documents"
    if not listed(config.data.source):
        yield "--config.data.source is empty: name a source, such as stdlib"
    for key in ("source", "validation_source"):
        for spec in listed(config.data[key]):
            if problem := spec_problem(SOURCES, spec, needed):
                yield (
                    f"--config.data.{key}: {problem}, which "
                    f"--config.objective.name={config.objective.name} reads"
                )


def spec_problem(registry: Registry, spec: str, needed: str = "") -> str:
    """Return an error message if NAME or NAME:ARGUMENT is invalid, else "".

    Args:
        registry: SOURCES or TOKENIZERS.
        spec: one source or tokenizer.
        needed: "documents" or "records" if the source must provide them.
    """
    name, _, argument = spec.partition(":")
    fitting = {n: e for n, e in registry.entries.items() if not needed or needed in e.holds}
    known = ", ".join(form for n, entry in fitting.items() for form in entry.forms or (n,))
    entry = registry.entries.get(name)
    if not entry or (entry.forms and all(bool(argument) != (":" in f) for f in entry.forms)):
        return f"unknown {registry.kind} {spec!r} (known: {known})"
    return "" if name in fitting else f"{spec} has no {needed} (known: {known})"


def tiled_attention_problem(config: ConfigDict) -> str:
    """Return the setting that rules out the "tiled" attention kernel, or ""."""
    model, objective = config.model, config.objective.name
    if model.family != "decoder" or OBJECTIVES.entries[objective].has_prefix:
        return f"--config.model.family={model.family} and --config.objective.name={objective}"
    if model.attention_dropout:
        return f"--config.model.attention_dropout={model.attention_dropout}"
    if model.positions in POSITION_BIASES:
        return f"--config.model.positions={model.positions}"
    for name in ("attention_scale", "attention_softcap", "window"):
        if model[name]:
            return f"--config.model.{name}={model[name]}"
    return ""


RULES = (
    _model_rules,
    _data_rules,
    _source_rules,
    _family_rules,
    _training_rules,
    _pattern_rules,
    _decoding_rules,
)
