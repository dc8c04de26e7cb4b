"""Configurations: defaults, loading an experiment file, overrides, validation.

An experiment file starts from `default()` and changes values:

    def get_config(variant="124m"):
        config = lm.config.default()
        config.model.n_layers = 12
        return config
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lm.errors import UserError
from lm.schema import SCHEMA, Key

# The families that an objective can train.
FAMILIES_OF = {
    "causal": ("decoder", "lstm", "nplm"),
    "prefix": ("decoder",),
    "masked": ("encoder",),
    "span_corruption": ("encoder_decoder",),
    "seq2seq": ("encoder_decoder", "lstm_encoder_decoder"),
    "classification": ("decoder", "encoder", "encoder_decoder", "lstm"),
    "span_qa": ("encoder",),
    "skip_gram": ("skip_gram",),
}

TRANSFORMERS = ("decoder", "encoder", "encoder_decoder")
LARGEST_INTEGER = 2**28  # sizes and steps are 32-bit in compiled programs


def default() -> ConfigDict:
    """The configuration with every key at its default."""
    config = ConfigDict()
    for path, key in SCHEMA.items():
        *sections, name = path.split(".")
        node = config
        for section in sections:
            if section not in node:
                node[section] = ConfigDict()
            node = node[section]
        node[name] = key.default
    return config


def flatten(config: ConfigDict | Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted path, value) of a configuration."""
    for name, value in config.items():
        path = f"{prefix}{name}"
        if isinstance(value, ConfigDict | Mapping):
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known name nearest to an unknown one, if one is near."""
    known = list(known)
    tail = name.rsplit(".", 1)[-1]
    close = [path for path in known if path.rsplit(".", 1)[-1] == tail]  # of another section
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def parse_value(path: str, text: str) -> Any:
    """The value of `--config.PATH=TEXT`, by the type of the key."""
    key = _key(path)
    try:
        if key.type is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if key.type is tuple:
            return tuple(float(part) for part in text.strip("()").split(",") if part.strip())
        if key.type is int:
            return int(text.replace("_", ""))
        return key.type(text)
    except (ValueError, KeyError):
        raise UserError(f"config.{path}={text}: expected {_type_name(key)}") from None


def set_value(config: ConfigDict, path: str, value: Any) -> None:
    """Set one key by its dotted path; an unknown path is an error that names the nearest."""
    _key(path)
    *sections, name = path.split(".")
    node = config
    for section in sections:
        node = node[section]
    try:
        node[name] = value
    except TypeError:  # a run.json of another version may hold another type
        raise UserError(f"config.{path}={value}: expected {_type_name(SCHEMA[path])}") from None


def load(spec: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """The validated configuration of `FILE.py[:VARIANT]`, or of a run's run.json, with
    `{path: text}` overrides applied."""
    file, _, variant = spec.partition(":")
    if not variant and Path(file).suffix == ".json":
        config = read_run_file(Path(file))
    else:
        config = call_file(Path(file), "get_config", variant)
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file}: get_config returned {type(config).__name__}, not a ConfigDict")
    for path, text in (overrides or {}).items():
        set_value(config, path, parse_value(path, text))
    validate(config)
    return config


def read_run_file(file: Path) -> ConfigDict:
    """The configuration in a run.json."""
    try:
        values = json.loads(file.read_text())["config"]
    except FileNotFoundError:
        raise UserError(f"no file {file}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: {type(error).__name__}: {error}") from None
    config = default()
    for path, value in flatten(values):
        set_value(config, path, tuple(value) if isinstance(value, list) else value)
    return config


def choose(variants: Mapping[str, Any], variant: str) -> Any:
    """The entry of an experiment's table of variants; an unknown one lists those there are."""
    if variant not in variants:
        raise UserError(f"unknown variant {variant!r}; there are {', '.join(variants)}")
    return variants[variant]


def validate(config: ConfigDict) -> None:
    """Raise UserError unless keys are known, typed and in range and the rules between them hold."""
    values = dict(flatten(config))
    for path in values:
        _key(path)
    for path, key in SCHEMA.items():
        if path not in values:
            raise UserError(f"config.{path} is missing; start from lm.config.default()")
        _check_value(path, key, values[path])
    for message in _broken_rules(config):
        raise UserError(message)


def differences(old: Mapping, new: Mapping) -> list[str]:
    """The keys, free ones aside, on which two configurations disagree, as `key: old → new`."""
    before, after = dict(flatten(old)), dict(flatten(new))
    return [
        f"{path}: {before.get(path, '(none)')} → {after.get(path, '(none)')}"
        for path in sorted({*before, *after})
        if not (path in SCHEMA and SCHEMA[path].free)
        and _plain(before.get(path)) != _plain(after.get(path))
    ]


def tiled_attention_problem(config: ConfigDict) -> str:
    """Why the "tiled" attention kernel cannot serve a configuration; empty if it can."""
    model, objective = config.model, config.objective.name
    if model.family != "decoder" or objective == "prefix":
        return f"config.model.family={model.family} and config.objective.name={objective}"
    if model.attention_dropout:
        return f"config.model.attention_dropout={model.attention_dropout}"
    if model.positions == "relative" or not model.scale_attention:
        return "relative positions or unscaled scores"
    return ""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _key(path: str) -> Key:
    if path not in SCHEMA:
        if any(known.startswith(f"{path}.") for known in SCHEMA):
            raise UserError(f"config.{path} is a section, not a key")
        raise UserError(f"unknown config key {path}{nearest(path, SCHEMA)}")
    return SCHEMA[path]


def _type_name(key: Key) -> str:
    if key.choices:
        return f"one of {', '.join(key.choices)}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return names.get(key.type, "numbers separated by commas")


def _check_value(path: str, key: Key, value: Any) -> None:
    shown = f"config.{path}={value}"
    if key.type is float:
        right_type = isinstance(value, int | float) and not isinstance(value, bool)
    elif key.type is int:
        right_type = isinstance(value, int) and not isinstance(value, bool)
    elif key.type is tuple:
        right_type = isinstance(value, tuple | list) and all(
            isinstance(item, int | float) for item in value
        )
    else:
        right_type = isinstance(value, key.type)
    if not right_type or (key.choices and value not in key.choices):
        raise UserError(f"{shown}: expected {_type_name(key)}{nearest(str(value), key.choices)}")
    if key.type in (int, float):
        if not abs(value) < float("inf"):
            raise UserError(f"{shown}: expected a finite number")
        if key.low is not None and value < key.low:
            raise UserError(f"{shown} is below {key.low}")
        high = LARGEST_INTEGER if key.high is None and key.type is int else key.high
        if high is not None and value > high:
            raise UserError(f"{shown} is above {high}")


def _broken_rules(config: ConfigDict) -> Iterator[str]:
    yield from _broken_model_rules(config)
    yield from _broken_data_rules(config)
    families = FAMILIES_OF[config.objective.name]
    if config.model.family not in families:
        yield (
            f"config.objective.name={config.objective.name} needs config.model.family "
            f"{' or '.join(families)}, not {config.model.family}"
        )
    if config.eval.best and config.eval.max_batches:
        yield (
            f"config.eval.best={config.eval.best} compares whole evaluations: "
            f"config.eval.max_batches={config.eval.max_batches} must be 0"
        )
    if config.init.vectors and config.init["from"]:
        yield "config.init.from and config.init.vectors exclude each other"
    sizes = [size for _, size in flatten(config.parallel.mesh)]
    if 0 in sizes or sizes.count(-1) > 1:
        yield "config.parallel.mesh: sizes are 1 or more, and at most one of them is -1"


def _broken_model_rules(config: ConfigDict) -> Iterator[str]:
    model = config.model
    transformer = model.family in TRANSFORMERS
    if transformer and not model.head_dim and model.d_model % model.n_heads:
        yield (
            f"config.model.d_model={model.d_model} is not divisible by "
            f"config.model.n_heads={model.n_heads}; change one, or set config.model.head_dim"
        )
    if model.n_kv_heads and model.n_heads % model.n_kv_heads:
        yield (
            f"config.model.n_heads={model.n_heads} is not divisible by "
            f"config.model.n_kv_heads={model.n_kv_heads}"
        )
    if (
        transformer
        and model.positions == "rotary"
        and (model.head_dim or model.d_model // model.n_heads) % 2
    ):
        yield "config.model.positions=rotary needs an even head dimension"
    if model.rope_scaling == "llama3" and model.rope_high_frequency <= model.rope_low_frequency:
        yield (
            f"config.model.rope_high_frequency={model.rope_high_frequency} must be above "
            f"config.model.rope_low_frequency={model.rope_low_frequency}"
        )
    if model.positions == "sinusoidal" and model.d_model % 2:
        yield "config.model.positions=sinusoidal needs an even config.model.d_model"
    if model.positions == "relative" and model.relative_max_distance <= model.relative_buckets // 2:
        yield (
            f"config.model.relative_max_distance={model.relative_max_distance} must be above half "
            f"of config.model.relative_buckets={model.relative_buckets}"
        )
    if transformer and model.init == "uniform":
        yield f"config.model.init=uniform is not for config.model.family={model.family}"
    if model.bidirectional and model.family == "lstm" and config.objective.name == "causal":
        yield "config.model.bidirectional lets a causal model see what it predicts"
    if model.bidirectional and (model.d_hidden or model.d_model) % 2:
        yield "config.model.bidirectional needs an even config.model.d_hidden"
    if model.n_experts:
        yield from _broken_expert_rules(config)
    if model.family == "lstm_encoder_decoder" and model.n_decoder_layers not in (0, model.n_layers):
        yield (
            "config.model.n_decoder_layers must be config.model.n_layers for lstm_encoder_decoder: "
            "each layer starts from the state of its encoder layer"
        )
    problem = tiled_attention_problem(config)
    if model.attention == "tiled" and problem:
        yield f"config.model.attention=tiled cannot be used with {problem}: use auto or xla"


def _broken_expert_rules(config: ConfigDict) -> Iterator[str]:
    model = config.model
    if model.family not in TRANSFORMERS:
        yield f"config.model.n_experts is not for config.model.family={model.family}"
    if model.experts_per_token > model.n_experts:
        yield (
            f"config.model.experts_per_token={model.experts_per_token} is above "
            f"config.model.n_experts={model.n_experts}"
        )
    for name in ("n_layers", "n_decoder_layers"):
        if model[name] % model.experts_every:
            yield (
                f"config.model.{name}={model[name]} is not divisible by "
                f"config.model.experts_every={model.experts_every}"
            )
    if model.activation_dropout:
        yield "config.model.activation_dropout is not for config.model.n_experts"


def _broken_data_rules(config: ConfigDict) -> Iterator[str]:
    model, data, train = config.model, config.data, config.train
    if model.carry and (data.order != "contiguous" or model.family != "lstm"):
        yield "config.model.carry needs config.data.order=contiguous and config.model.family=lstm"
    if data.order == "contiguous" and config.objective.name != "causal":
        yield "config.data.order=contiguous needs config.objective.name=causal"
    if data.order == "contiguous" and len(data.source.split(",")) > 1:
        yield "config.data.order=contiguous reads a single source"
    for name in ("sequence_length", "target_length"):
        if model.max_length and data[name] > model.max_length:
            yield (
                f"config.data.{name}={data[name]} is longer than "
                f"config.model.max_length={model.max_length}"
            )
    if data.batch_size % train.microbatches:
        yield (
            f"config.data.batch_size={data.batch_size} is not divisible by "
            f"config.train.microbatches={train.microbatches}"
        )
    if data.weights and len(data.weights) != len(data.source.split(",")):
        yield (
            f"config.data.weights has {len(data.weights)} numbers for "
            f"{len(data.source.split(','))} corpora in config.data.source"
        )
    if any(not 0 < weight < float("inf") for weight in data.weights):
        yield f"config.data.weights={data.weights}: every weight must be above 0"


def call_file(file: Path, function: str, variant: str) -> Any:
    """What a function of a Python file returns, called with the variant if there is one."""
    if not file.is_file():
        raise UserError(f"no experiment file {file}")
    spec = importlib.util.spec_from_file_location(
        f"experiment_{re.sub(r'[^0-9a-zA-Z]', '_', file.stem)}", file
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise UserError(f"{file} has no {function}(variant)")
        called = getattr(module, function)
        return called(variant) if variant else called()
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except Exception as error:  # the experiment file is the user's code: say where it failed
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)
        ]
        where = f"{file}:{lines[-1]}" if lines else str(file)
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
