"""Configuration of a run, read from its workdir."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from lm import config as configs
from lm.errors import UserError
from lm.storage import storage_path

RUN_FILE = "run.json"

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
