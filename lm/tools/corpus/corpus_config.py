"""Configuration of `lm corpus`: sections, defaults and validation.

    def get_config():
        config = ConfigDict()
        config.sources = {"web": {"source": "jsonl:crawl/*.jsonl.gz", "license": "CC BY 4.0"}}
        config.rules = ("language", "gopher_quality", "personal_data", "near_duplicates")
        config.language = {"languages": ("en", "de")}
        return config

Rules run in the given order; the section named like a rule has its options.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lm import config as configs
from lm.errors import UserError, nearest
from lm.tools.corpus.corpus_rules import BY_LANGUAGE, RULES
from lm.tools.corpus.corpus_sources import SOURCE_KEYS, NamedSource

FORMATS = ("jsonl.gz", "jsonl.zst", "jsonl", "parquet")
WORDS = "unicode"  # value of `words` that needs no package; other values are languages of datatrove

# Sections and keys of every configuration, with their defaults.
DEFAULTS: dict[str, Any] = {
    "rules": (),
    "tasks": 0,
    "words": WORDS,
    "write": {
        "format": FORMATS[0],
        "columns": ("source", "license", "language", "url"),
        "megabytes": 0,
    },
    "card": {"title": "", "columns": ("source", "license", "language"), "examples": 3},
    "cluster": {
        "cpus_per_task": 1,
        "mem_per_cpu_gb": 2,
        "partition": "",
        "time": "24:00:00",
        "qos": "",
        "env_command": "",
    },
}
# Execution options, which do not affect the output.
FREE = ("cluster", "card")
_SOURCE = {"source": "", "license": ""}

Config = dict[str, Any]


def load_corpus_config(spec: str, overrides: Mapping[str, str]) -> Config:
    """Load a configuration and fill in the defaults.

    Args:
        spec: FILE.py[:VARIANT].
        overrides: text values by dotted path.

    Raises:
        UserError: the file, a key or a value is invalid.
    """
    file, _, variant = spec.partition(":")
    given = configs.call_file(Path(file), "get_config", variant)
    if not isinstance(given, ConfigDict | Mapping):
        raise UserError(f"{file}: get_config returned {type(given).__name__}, not a ConfigDict")
    given = given.to_dict() if isinstance(given, ConfigDict) else dict(given)
    for path, text in overrides.items():
        _override(given, path, text)
    config = _checked(given)
    _require_rules(config)
    return config


def named_sources(config: Config, section: str) -> dict[str, NamedSource]:
    """Return the sources of a section, `sources` or `tests`, by name.

    Raises:
        UserError: one is unknown or missing.
    """
    found = {}
    for name, values in config[section].items():
        data = {key: values[key] for key in SOURCE_KEYS}
        found[name] = NamedSource(name, values["source"], values["license"], data)
        try:
            found[name].open()
        except (UserError, ImportError) as error:
            raise UserError(f"config.{section}.{name}: {error}") from error
    return found


def _override(given: dict[str, Any], path: str, text: str) -> None:
    *sections, name = path.split(".")
    node = given
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"--config.{path}: config.{section} is a value, not a section")
    node[name] = _Text(text)


class _Text(str):
    """Command-line value, still to be converted to its key's type."""


def _checked(given: Mapping[str, Any]) -> Config:
    """Return a configuration with all keys; UserError for unknown keys and wrong types."""
    known = (*DEFAULTS, "sources", "tests", *RULES)
    if unknown := sorted(name for name in given if name not in known):
        raise UserError(f"unknown section or key config.{unknown[0]}{nearest(unknown[0], known)}")
    config: Config = {}
    for name, default in DEFAULTS.items():
        if isinstance(default, dict):
            config[name] = _section(name, given.get(name, {}), default)
        else:
            config[name] = _value(name, given.get(name, default), default)
    data = configs.default().data
    source_defaults = _SOURCE | {key: data[key] for key in SOURCE_KEYS}
    for section in ("sources", "tests"):
        entries = given.get(section, {})
        if not isinstance(entries, Mapping):
            raise UserError(f"config.{section}: expected {{NAME: {{'source': …}}}}")
        config[section] = {
            name: _section(f"{section}.{name}", entries[name], source_defaults)
            for name in sorted(entries)
        }
    for name in RULES:  # options of unused rules are validated too
        options = _options(name, given.get(name, {}), name in config["rules"])
        if name in config["rules"]:
            config[name] = options
    return config


def _require_rules(config: Config) -> None:
    """Raise UserError for unknown or repeated rules, or if there is no source."""
    if not config["sources"]:
        raise UserError("config.sources is empty: {NAME: {'source': 'jsonl:crawl/*.jsonl.gz'}}")
    for name, values in config["sources"].items():
        if not values["source"]:
            raise UserError(f"config.sources.{name}.source is missing")
    for name in config["rules"]:
        if name not in RULES:
            known = ", ".join(RULES)
            raise UserError(f"unknown rule {name!r}{nearest(name, RULES)} (known: {known})")
        if config["rules"].count(name) > 1:
            raise UserError(f"config.rules: {name} is listed twice")
    if config["write"]["format"] not in FORMATS:
        wrong = config["write"]["format"]
        raise UserError(f"config.write.format={wrong}: expected one of {', '.join(FORMATS)}")
    for path in ("tasks", "write.megabytes"):
        *section, key = path.split(".")
        if (config[section[0]] if section else config)[key] < 0:
            raise UserError(f"config.{path} is below 0")


def _section(path: str, values: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise UserError(f"config.{path} is a section, not a value")
    if unknown := sorted(name for name in values if name not in defaults):
        raise UserError(f"unknown key config.{path}.{unknown[0]}{nearest(unknown[0], defaults)}")
    return {
        name: _value(f"{path}.{name}", values.get(name, default), default)
        for name, default in defaults.items()
    }


def _options(rule: str, values: Any, is_used: bool) -> dict[str, Any]:
    """Return the options of a rule, with defaults filled in."""
    options = RULES[rule].options
    if not isinstance(values, Mapping):
        raise UserError(f"config.{rule} is a section, not a value")
    if unknown := sorted(name for name in values if name not in options):
        known = ", ".join(options) or "none"
        hint = nearest(unknown[0], options)
        raise UserError(f"rule {rule} has no option {unknown[0]!r}{hint} (available: {known})")
    found: dict[str, Any] = {}
    for name, parameter in options.items():
        if name == BY_LANGUAGE:
            found[name] = _options_by_language(rule, values)
            continue
        needed = parameter.default is inspect.Parameter.empty
        is_tuple = "Sequence" in str(parameter.annotation)
        if is_used and needed and name not in values:
            raise UserError(f"rule {rule} needs its option: config.{rule}.{name}")
        default = (() if is_tuple else "") if needed else parameter.default
        value = values.get(name, default)
        if "None" not in str(parameter.annotation):
            found[name] = _value(f"{rule}.{name}", value, default)
        elif isinstance(default, int) and isinstance(value, float):
            found[name] = value  # averages: datatrove's annotations say int
        elif value is None or value == "none":
            found[name] = None  # disables this part of the rule
        else:
            found[name] = _value(f"{rule}.{name}", value, () if default is None else default)
    return found


def _options_by_language(rule: str, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return all options of a rule for each language with different ones."""
    by_language = values.get(BY_LANGUAGE, {})
    if not isinstance(by_language, Mapping):
        raise UserError(f"config.{rule}.{BY_LANGUAGE}: expected {{LANGUAGE: {{OPTION: …}}}}")
    own = (BY_LANGUAGE, "languages")
    common = {name: value for name, value in values.items() if name not in own}
    found = {}
    for language, differing in by_language.items():
        path = f"config.{rule}.{BY_LANGUAGE}.{language}"
        if not isinstance(differing, Mapping):
            raise UserError(f"{path} is a section, not a value")
        if wrong := [name for name in own if name in differing]:
            raise UserError(f"{path}.{wrong[0]}: an option of the rule, not of a language")
        try:
            options = _options(rule, {**common, **differing}, is_used=True)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        found[language] = {name: options[name] for name in options if name not in own}
    return found


def _value(path: str, value: Any, default: Any) -> Any:
    """Return a value, converted from command-line text if necessary; UserError for a wrong type."""
    if isinstance(value, _Text):
        value = _parsed(path, value, default)
    kind = type(default)
    if kind is tuple and isinstance(value, list | tuple):
        return _tuples(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise UserError(f"config.{path}={value!r}: expected {_expected(default)}")
    return value


def _parsed(path: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return str(text)
    if isinstance(default, tuple) and not text.startswith("("):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        raise UserError(f"--config.{path}={text}: expected {_expected(default)}") from None


def _tuples(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(_tuples(v) if isinstance(v, list | tuple) else v for v in values)


def _expected(default: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return names.get(type(default), "a tuple")
