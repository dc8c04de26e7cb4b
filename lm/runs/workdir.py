"""Content of run.json: configuration of a run, and the history of its changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lm import config as configs
from lm.errors import UserError
from lm.storage import storage_path

RUN_FILE = "run.json"
BATCH_SIZE = "data.batch_size"

Metadata = dict[str, Any]

# Overrides that turn the configuration of a LoRA run into that of the merged model.
MERGED_OVERRIDES = {"lora.rank": "0", "optimizer.freeze": "", "init.from": ""}


def load_run_config(workdir: Path, overrides: Mapping[str, str]) -> ConfigDict:
    """Return the configuration of a run with overrides, `{path: text}`, applied."""
    if not (workdir / RUN_FILE).is_file():
        raise UserError(f"no run in {storage_path(workdir)}: it has no {RUN_FILE}")
    config = configs.read_run_file(workdir / RUN_FILE)
    for path, text in overrides.items():
        configs.set_value(config, path, configs.parse_value(path, text))
    configs.validate(config)
    return config


def history_of(metadata: Mapping[str, Any]) -> list[Metadata]:
    """Return the history in the metadata of a run, [] if it was never changed.

    Entries are in their order: {"step", "changed"} with old and new value of each key that changed
    after that step, or {"step", "forked_from"}.

    Raises:
        UserError: it is damaged.
    """
    history = metadata.get("history", [])
    if not isinstance(history, list) or not all(_is_entry(entry) for entry in history):
        raise UserError(f"{RUN_FILE} is damaged: its history cannot be read")
    return history


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or type(entry.get("step")) is not int or entry["step"] < 0:
        return False
    changed = entry.get("changed", {})
    pairs = changed.values() if isinstance(changed, dict) else [None]
    sizes = changed.get(BATCH_SIZE, [1]) if isinstance(changed, dict) else []
    return all(isinstance(pair, list) and len(pair) == 2 for pair in pairs) and all(
        type(size) is int and size > 0 for size in sizes
    )


def metadata_at(metadata: Metadata, step: int) -> Metadata:
    """Return the metadata of a run with the configuration of its checkpoint of a step, flat."""
    values = dict(configs.flatten(metadata["config"]))
    for entry in reversed(history_of(metadata)):
        if entry["step"] >= step:
            values |= {path: old for path, (old, _) in entry.get("changed", {}).items()}
    return metadata | {"config": values}


def first_row(metadata: Mapping[str, Any]) -> int:
    """Return the row with which step 0 would have begun, had all batches had the size of now.

    So the batches of the run go on at the first row that no earlier batch had.
    """
    rows = step = 0
    for entry in history_of(metadata):
        if BATCH_SIZE in entry.get("changed", {}):
            size, _ = entry["changed"][BATCH_SIZE]
            rows += (entry["step"] - step) * size
            step = entry["step"]
    return rows - step * metadata["config"]["data"]["batch_size"]
