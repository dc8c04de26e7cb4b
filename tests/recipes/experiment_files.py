"""Experiments by name."""

from pathlib import Path

from lm import config as configs

FOLDER = Path(__file__).parents[2] / "experiments"


def load(spec, **changes):
    overrides = {path.replace("__", "."): str(value) for path, value in changes.items()}
    return configs.load_config(f"{FOLDER}/{spec}", overrides)
