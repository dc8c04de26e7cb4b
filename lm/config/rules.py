"""The rules between configuration keys: which values go together."""

from __future__ import annotations

from collections.abc import Iterator

from ml_collections import ConfigDict

from lm.config.registries import families_of

TRANSFORMERS = ("decoder", "encoder", "encoder_decoder")


def broken_rules(config: ConfigDict) -> Iterator[str]:
    """What is wrong between the keys of a configuration whose every key is right by itself."""
    yield from _model_rules(config)
    yield from _mup_rules(config)
    yield from _data_rules(config)
    families = families_of(config.objective.name)
    if config.model.family not in families:
        yield (
            f"--config.objective.name={config.objective.name} needs --config.model.family "
            f"{' or '.join(families)}, not {config.model.family}"
        )
    for name in ("max_batches", "final_batches"):
        if config.eval.best and config.eval[name]:
            yield (
                f"--config.eval.best={config.eval.best} compares whole evaluations: "
                f"--config.eval.{name}={config.eval[name]} must be 0"
            )
    if config.init.vectors and config.init["from"]:
        yield "--config.init.from and --config.init.vectors exclude each other"
    if config.schedule.name == "inverse" and not config.schedule.final_ratio:
        yield (
            "--config.schedule.name=inverse never reaches 0: "
            "set --config.schedule.final_ratio above"
        )
    sizes = list(config.parallel.mesh.values())
    if 0 in sizes or sizes.count(-1) > 1:
        yield "--config.parallel.mesh: sizes are 1 or more, and at most one of them is -1"


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
    if model.rope_scaling == "llama3" and model.rope_high_frequency <= model.rope_low_frequency:
        yield (
            f"--config.model.rope_high_frequency={model.rope_high_frequency} must be above "
            f"--config.model.rope_low_frequency={model.rope_low_frequency}"
        )
    if model.positions == "sinusoidal" and model.d_model % 2:
        yield "--config.model.positions=sinusoidal needs an even --config.model.d_model"
    if model.positions == "relative" and model.relative_max_distance <= model.relative_buckets // 2:
        yield (
            f"--config.model.relative_max_distance={model.relative_max_distance} must be above "
            f"half of --config.model.relative_buckets={model.relative_buckets}"
        )
    if transformer and model.init == "uniform":
        yield f"--config.model.init=uniform is not for --config.model.family={model.family}"
    if model.pooling == "mean" and not transformer:
        yield f"--config.model.pooling=mean is not for --config.model.family={model.family}"
    if model.init == "uniform" and model.init_truncated:
        yield "--config.model.init=uniform has nothing to cut: --config.model.init_truncated"
    if model.bidirectional and model.family == "lstm" and config.objective.name == "causal":
        yield "--config.model.bidirectional lets a causal model see what it predicts"
    if model.bidirectional and (model.d_hidden or model.d_model) % 2:
        yield "--config.model.bidirectional needs an even --config.model.d_hidden"
    if model.n_experts:
        yield from _expert_rules(config)
    if model.family == "lstm_encoder_decoder" and model.n_decoder_layers not in (0, model.n_layers):
        yield (
            "--config.model.n_decoder_layers must be --config.model.n_layers for "
            "lstm_encoder_decoder: each layer starts from the state of its encoder layer"
        )
    yield from _window_rules(config)
    problem = tiled_attention_problem(config)
    if model.attention == "tiled" and problem:
        yield f"--config.model.attention=tiled cannot be used with {problem}: use auto or xla"


def _window_rules(config: ConfigDict) -> Iterator[str]:
    model = config.model
    if model.window and model.family != "decoder":
        yield (
            f"--config.model.window={model.window} is not for --config.model.family={model.family}"
        )
    for name in ("global_every", "rope_theta_local"):
        if model[name] and not model.window:
            yield f"--config.model.{name}={model[name]} needs --config.model.window"


def _expert_rules(config: ConfigDict) -> Iterator[str]:
    model = config.model
    if model.family not in TRANSFORMERS:
        yield f"--config.model.n_experts is not for --config.model.family={model.family}"
    if model.experts_per_token > model.n_experts:
        yield (
            f"--config.model.experts_per_token={model.experts_per_token} is above "
            f"--config.model.n_experts={model.n_experts}"
        )
    for name in ("n_layers", "n_decoder_layers"):
        if model[name] % model.experts_every:
            yield (
                f"--config.model.{name}={model[name]} is not divisible by "
                f"--config.model.experts_every={model.experts_every}"
            )
    if model.activation_dropout:
        yield "--config.model.activation_dropout is not for --config.model.n_experts"


def _mup_rules(config: ConfigDict) -> Iterator[str]:
    model = config.model
    if model.mup_base_head_dim and not model.mup_base_width:
        yield (
            f"--config.model.mup_base_head_dim={model.mup_base_head_dim} needs "
            "--config.model.mup_base_width"
        )
    if not model.mup_base_width:
        return
    if model.family not in TRANSFORMERS:
        yield f"--config.model.mup_base_width is not for --config.model.family={model.family}"
    if config.optimizer.name not in ("adamw", "muon"):
        yield (
            "--config.model.mup_base_width needs --config.optimizer.name adamw or muon, "
            f"not {config.optimizer.name}"
        )


def _data_rules(config: ConfigDict) -> Iterator[str]:
    model, data, train = config.model, config.data, config.train
    if model.carry and (data.order != "contiguous" or model.family != "lstm"):
        yield (
            "--config.model.carry needs --config.data.order=contiguous and "
            "--config.model.family=lstm"
        )
    if data.order == "contiguous" and config.objective.name != "causal":
        yield "--config.data.order=contiguous needs --config.objective.name=causal"
    if data.order == "contiguous" and len(data.source.split(",")) > 1:
        yield "--config.data.order=contiguous reads a single source"
    for name in ("sequence_length", "target_length"):
        if model.max_length and data[name] > model.max_length:
            yield (
                f"--config.data.{name}={data[name]} is longer than "
                f"--config.model.max_length={model.max_length}"
            )
    if data.batch_size % train.microbatches:
        yield (
            f"--config.data.batch_size={data.batch_size} is not divisible by "
            f"--config.train.microbatches={train.microbatches}"
        )
    if data.weights and len(data.weights) != len(data.source.split(",")):
        yield (
            f"--config.data.weights has {len(data.weights)} numbers for "
            f"{len(data.source.split(','))} corpora in --config.data.source"
        )
    if any(not 0 < weight < float("inf") for weight in data.weights):
        yield f"--config.data.weights={data.weights}: every weight must be above 0"


def tiled_attention_problem(config: ConfigDict) -> str:
    """Why the "tiled" attention kernel cannot serve a configuration; empty if it can."""
    model, objective = config.model, config.objective.name
    if model.family != "decoder" or objective == "prefix":
        return f"--config.model.family={model.family} and --config.objective.name={objective}"
    if model.attention_dropout:
        return f"--config.model.attention_dropout={model.attention_dropout}"
    if model.positions == "relative":
        return "--config.model.positions=relative"
    for name in ("attention_scale", "attention_softcap", "window"):
        if model[name]:
            return f"--config.model.{name}={model[name]}"
    return ""
