"""Small real runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import arguments, finish, start

from lm import experiment

SMALL = {
    "model.n_layers": 2,
    "model.d_model": 32,
    "model.n_heads": 4,
    "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
    "data.tokenizer": "byte",
    "data.sequence_length": 16,
    "data.batch_size": 8,
    "data.validation_fraction": 0.1,
    "optimizer.learning_rate": 1e-3,
    "train.steps": 60,
    "train.steps_per_dispatch": 2,
    "eval.every_steps": 20,
    "checkpoint.every_steps": 6,
    "log.tensorboard": False,
}


@pytest.fixture(scope="session")
def experiment_file(tmp_path_factory) -> Path:
    """An experiment on a text made here: lines of arithmetic, something that can be learned."""
    folder = tmp_path_factory.mktemp("experiment")
    lines = (f"{i} + {i * 7 % 13} = {i + i * 7 % 13}\n" for i in range(1500))
    (folder / "sums.txt").write_text("".join(lines))
    body = "\n".join(f"    config.{key} = {value!r}" for key, value in SMALL.items())
    file = folder / "sums.py"
    file.write_text(
        "from lm.config import default\n\n\ndef get_config():\n    config = default()\n"
        f"    config.data.source = 'text:{folder / 'sums.txt'}'\n{body}\n    return config\n"
    )
    return file


@pytest.fixture(scope="session")
def undisturbed(experiment_file, tmp_path_factory) -> Path:
    """The workdir of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(arguments(experiment_file, workdir)))
    return workdir


@pytest.fixture
def one_build(monkeypatch):
    """Starts of one configuration have one experiment, whose functions are compiled once."""
    built, build = {}, experiment.build

    def build_once(config, devices, tokenizer=None):
        key = config.to_json(), tuple(devices), tokenizer and tokenizer.digest
        if key not in built:
            built[key] = build(config, devices, tokenizer)
        return built[key]

    monkeypatch.setattr(experiment, "build", build_once)
