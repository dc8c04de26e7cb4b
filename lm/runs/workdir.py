"""Workdir of a run: run.json, tokenizer/, checkpoints/ and metrics.jsonl.

`run.json` holds the resolved configuration and the digests of tokenizer and data. Starting a run
again with another configuration or other data is an error that names the difference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lm import config as configs
from lm.config.experiment_file import plugin_metadata
from lm.data.dataset import Dataset
from lm.data.tokenizers.tokenizer import Tokenizer, load_saved_tokenizer
from lm.errors import UserError
from lm.storage import storage_path, upload_changes, write_atomically

RUN_FILE = "run.json"

# Overrides that turn the configuration of a LoRA run into that of the merged model.
MERGED_OVERRIDES = {"lora.rank": "0", "optimizer.freeze": "", "init.from": ""}


def prepare_workdir(
    workdir: Path, config: ConfigDict, dataset: Dataset, write: bool
) -> dict[str, Any]:
    """Create the workdir of a new run, or check an existing one against configuration and data.

    Args:
        workdir: local folder of the run.
        config: resolved configuration.
        dataset: tokenizer and data.
        write: whether this process creates files (the lead process does).

    Returns:
        The metadata of the run.

    Raises:
        UserError: the workdir holds another run, or cannot be written.
    """
    metadata = {
        "config": json.loads(config.to_json()),
        "fingerprint": dataset.fingerprint,
        **plugin_metadata(),
    }
    before = _read(workdir)
    if before is not None:
        _check_same(workdir, before, metadata)
    if write:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            dataset.tokenizer.save(workdir / "tokenizer")
            write_atomically(workdir / RUN_FILE, json.dumps(metadata, indent=1))
            upload_changes()
        except (NotADirectoryError, FileExistsError, PermissionError) as error:
            raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}") from None
    return metadata


def load_run_config(workdir: Path, overrides: Mapping[str, str]) -> ConfigDict:
    """Return the configuration of a run with overrides, `{path: text}`, applied."""
    if not (workdir / RUN_FILE).is_file():
        raise UserError(f"no run in {storage_path(workdir)}: it has no {RUN_FILE}")
    config = configs.read_run_file(workdir / RUN_FILE)
    for path, text in overrides.items():
        configs.set_value(config, path, configs.parse_value(path, text))
    configs.validate(config)
    return config


def load_tokenizer(workdir: Path) -> Tokenizer:
    """Return the tokenizer that the run was trained with."""
    tokenizer = load_saved_tokenizer(workdir / "tokenizer")
    check_tokenizer(workdir, tokenizer)
    return tokenizer


def check_tokenizer(workdir: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError if the run was trained with another tokenizer."""
    metadata = _read(workdir)
    assert metadata is not None
    if tokenizer.digest != metadata["fingerprint"]["tokenizer"]:
        raise UserError(f"the run in {storage_path(workdir)} was trained with another tokenizer")


def _read(workdir: Path) -> dict[str, Any] | None:
    try:
        return json.loads((workdir / RUN_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError as error:
        raise UserError(f"{storage_path(workdir / RUN_FILE)} is damaged: {error}") from None


def _check_same(workdir: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    different = configs.differences(before["config"], now["config"])
    if different:
        raise UserError(
            f"{storage_path(workdir)} holds a run of another configuration "
            f"({'; '.join(different)}); use another --workdir"
        )
    old, new = before["fingerprint"], now["fingerprint"]
    changed = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if changed:
        raise UserError(
            f"changed since the run in {storage_path(workdir)} was started: {', '.join(changed)}; "
            "restore the data, or use another --workdir"
        )
