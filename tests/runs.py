"""Folders that look like trained runs, or contain runs with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm.config import default, set_value
from lm.data.tokenizer import Tokenizer
from lm.experiment import build, resolve
from lm.runs.checkpoints import Checkpoints, run_metadata
from lm.runs.workdir import RUN_FILE
from lm.train_step import TrainState

TINY = {
    "model.n_layers": 2,
    "model.d_model": 16,
    "model.n_heads": 2,
    "model.vocab_size": 64,
    "data.sequence_length": 8,
    "data.batch_size": 4,
    "parallel.preset": "custom",
    "parallel.mesh.data": 1,
    "log.tensorboard": False,
}
CLOCK = {
    "seconds": {"compile": 1, "data": 0, "step": 8, "eval": 1, "checkpoint": 0, "other": 0},
    "starts": 1,
    "goodput": 0.8,
}


def write_run(
    folder: Path,
    values: Mapping[str, Any],
    losses: Sequence[float | None],
    validation: float | None = None,
    clock: Mapping[str, Any] | None = None,
) -> Path:
    """A run with a loss a step and perhaps one of validation at its end; half a second a step."""
    config = default()
    for path, value in (TINY | {"train.steps": len(losses)} | dict(values)).items():
        set_value(config, path, value)
    folder.mkdir(parents=True)
    run = {"config": json.loads(resolve(config, "cpu").to_json()), "fingerprint": {}}
    (folder / "run.json").write_text(json.dumps(run))
    speed = {"skipped": 0.0, "learning_rate": 0.1, "seconds_per_step": 0.5}
    speed["tokens_per_second"] = 64.0
    rows: list[dict] = [{"step": i, "loss": x} | speed for i, x in enumerate(losses, 1)]
    if validation is not None:
        rows.append({"step": len(losses), "eval/validation/loss": validation})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counted = CLOCK | {"steps_computed": len(losses)} | dict(clock or {})
    (folder / "clock.json").write_text(json.dumps(counted))
    return folder


def random_run(folder: Path, values: Mapping[str, Any], tokenizer: Tokenizer | None) -> Path:
    """A run with one checkpoint, in which no parameter is at a value that hides it."""
    config = default()
    for path, value in (TINY | {"data.batch_size": 1} | dict(values)).items():
        set_value(config, path, value)
    experiment = build(config, jax.devices()[:1], tokenizer)
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        centre, deviation = (1, 0.2) if path[-1].key == "scale" else (0, 0.4)
        return np.float32(rng.normal(centre, deviation, leaf.shape))

    params = jax.tree_util.tree_map_with_path(draw, experiment.state_shapes.params)
    metadata = run_metadata(experiment.config, {"tokenizer": tokenizer.digest if tokenizer else ""})
    folder.mkdir(parents=True)
    if tokenizer:
        tokenizer.save(folder / "tokenizer")
    (folder / RUN_FILE).write_text(json.dumps(metadata))
    checkpoints = Checkpoints(folder / "checkpoints", experiment.config.checkpoint, metadata)
    checkpoints.save(0, TrainState(jax.device_put(np.int32(0)), jax.device_put(params), {}, {}))
    checkpoints.close()
    return folder
