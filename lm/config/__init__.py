"""Configurations: schema, registries, experiment files, overrides, validation rules.

Read `registry.py` (keys, options, entries), `registries.py` (all components selected by name, and
the schema), `experiment_file.py`, and `rules.py` with `model_rules.py` and `patterns.py`;
`run_file.py` reads saved runs and `registration.py` validates plug-ins. The functions here are the
public API; importing the package does not import JAX. Rules that depend on the mesh or platform are
in `lm/experiment.py`.

An experiment file starts from `default()` and changes values:

    def get_config(variant="124m"):
        config = lm.config.default()
        config.model.n_layers = 12
        return config
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lm.config.experiment_file import error_in, execute
from lm.config.registries import SCHEMA
from lm.config.registry import Key, listed
from lm.config.rules import broken_rules
from lm.errors import UserError
from lm.storage import AnyPath, resolve_path


def default() -> ConfigDict:
    """Return the configuration with every key at its default."""
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
    """Yield every (dotted path, value) of a configuration."""
    for name, value in config.items():
        path = f"{prefix}{name}"
        if isinstance(value, ConfigDict | Mapping) and (value or SCHEMA.is_section(path)):
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def parse_value(path: str, text: str) -> Any:
    """Parse the value of `--config.PATH=TEXT` to the type of the key."""
    key = require_key(path)
    try:
        return key.parse(text)
    except (ValueError, KeyError):
        raise UserError(f"--config.{path}={text}: expected {key.type_name()}") from None


def set_value(config: ConfigDict, path: str, value: Any) -> None:
    """Set a key by its dotted path; an unknown path raises UserError with the closest match."""
    require_key(path)
    *sections, name = path.split(".")
    node = config
    for section in sections:
        node = node.get(section) if isinstance(node, ConfigDict) else None
    if not isinstance(node, ConfigDict):
        raise UserError(f"--config.{path}: the configuration does not have this key's section")
    try:
        node[name] = value
    except TypeError:  # a run.json of another version may have another type here
        raise UserError(f"--config.{path}={value}: expected {SCHEMA[path].type_name()}") from None


def load_config(spec: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Load and validate a configuration.

    Args:
        spec: `FILE.py[:VARIANT]`, or the run.json of a run.
        overrides: values by dotted path, such as {"train.steps": 100}; strings are parsed as on
            the command line.

    Raises:
        UserError: the file, a key or a value is invalid.
    """
    file, _, variant = spec.partition(":")
    if spec.endswith(".json"):
        config = read_run_file(resolve_path(spec), given=True)
    else:
        config = call_file(Path(file), "get_config", variant)
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file}: get_config returned {type(config).__name__}, not a ConfigDict")
    for path, value in (overrides or {}).items():
        set_value(config, path, parse_value(path, value) if isinstance(value, str) else value)
    validate(config)
    return config


def call_file(file: Path, function: str, variant: str) -> Any:
    """Execute a Python file and return the result of one of its functions.

    Args:
        file: path of the file.
        function: name of the function.
        variant: argument of the function; "" for no argument.

    Raises:
        UserError: the file or the function does not exist, or fails.
    """
    module = execute(file)
    if not hasattr(module, function):
        raise UserError(f"{file} has no {function}(variant)")
    called = getattr(module, function)
    try:
        return called(variant) if variant else called()
    except BaseException as error:
        raise error_in(file, error) from error


def read_run_file(file: AnyPath, given: bool = False) -> ConfigDict:
    """Return the configuration in a run.json and import the plug-ins of the run.

    Args:
        file: path of the file.
        given: return the configuration as given by the user, so that values derived from other
            keys, the data or the platform are resolved again.
    """
    from lm.config.run_file import read_run_json

    run = read_run_json(file)
    before = run.get("given", {}) if given else {}
    if not isinstance(before, dict):
        raise UserError(f"{file} is damaged ({'given'!r} is invalid)")
    values = dict(flatten(run["config"])) | before
    config = default()
    for path, value in values.items():
        set_value(config, path, tuple(value) if isinstance(value, list) else value)
    return config


def choose(variants: Mapping[str, Any], variant: str) -> Any:
    """Look up a variant in an experiment's table.

    Raises:
        UserError: the variant does not exist; the message lists the known ones.
    """
    if variant not in variants:
        raise UserError(f"unknown variant {variant!r} (known: {', '.join(variants)})")
    return variants[variant]


def fill(config: ConfigDict, columns: str, row: Iterable[Any]) -> None:
    """Set keys to the values of a table row.

    Args:
        config: configuration to change.
        columns: dotted paths, separated by spaces.
        row: one value per path.
    """
    for path, value in zip(columns.split(), row, strict=True):
        set_value(config, path, value)


def validate(config: ConfigDict) -> None:
    """Raise UserError if a key is unknown, mistyped, out of range or violates a rule."""
    values = dict(flatten(config))
    for path in values:
        require_key(path)
    for path, key in SCHEMA.items():
        if path in values:
            if problem := key.problem(values[path]):
                shown = " ".join(str(values[path]).split())
                raise UserError(f"--config.{path}={shown}{problem}")
        elif path not in SCHEMA.unused_options(config):
            raise UserError(f"--config.{path} is missing; start from lm.config.default()")
    for message in broken_rules(config):
        raise UserError(message)


def without_unused_options(config: ConfigDict) -> ConfigDict:
    """Return a copy without the options of unused plug-ins that have their default values.

    So a run does not depend on plug-ins that the process imported for another run.
    """
    config = config.copy_and_resolve_references()
    values = dict(flatten(config))
    for path, key in SCHEMA.unused_options(config).items():
        if path in values and values[path] == key.default:
            *sections, name = path.split(".")
            node = config
            for section in sections:
                node = node[section]
            del node[name]
    return config


def fill_defaults(config: ConfigDict, platform: str) -> ConfigDict:
    """Return a copy with every 0 or "auto" that stands for a default resolved.

    The vocabulary size stays 0, since it may require the tokenizer; the attention kernel stays
    "auto", because the run may be resumed or evaluated on other devices.

    Args:
        config: valid configuration.
        platform: "cpu", "tpu" or "gpu".
    """
    config = without_unused_options(config)
    model, data = config.model, config.data
    model.n_kv_heads = model.n_kv_heads or model.n_heads
    model.head_dim = model.head_dim or model.d_model // model.n_heads
    model.d_ff = model.d_ff or 4 * model.d_model
    data.target_length = data.target_length or data.sequence_length
    longest = data.target_length
    if model.n_mels:
        model.max_source_length = model.max_source_length or data.sequence_length
    else:
        longest = max(longest, data.sequence_length)
    model.max_length = model.max_length or longest
    model.n_decoder_layers = model.n_decoder_layers or model.n_layers
    model.d_hidden = model.d_hidden or model.d_model
    model.n_classes = model.n_classes or max(1, len(listed(data.labels)))
    config.eval.batch_size = config.eval.batch_size or data.batch_size
    config.decode.max_length = config.decode.max_length or data.target_length
    if model.dtype == "auto":
        model.dtype = "float32" if platform == "cpu" else "bfloat16"
    return config


def require_key(path: str) -> Key:
    """Look up a key by its dotted path; an unknown path raises UserError with the closest match."""
    if path not in SCHEMA:
        if SCHEMA.is_section(path):
            hint = f"; did you mean --config.{path}.name?" if f"{path}.name" in SCHEMA else ""
            raise UserError(f"--config.{path} is a section, not a key{hint}")
        from lm.config.synonyms import suggested_keys

        hint = " or ".join(f"--config.{key}" for key in suggested_keys(path, SCHEMA))
        raise UserError(f"unknown key --config.{path}" + (hint and f"; did you mean {hint}?"))
    return SCHEMA[path]
