"""The best checkpoint: chosen by a validation figure, kept over restarts, found by `lm`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.cli import main
from lm.config import default
from lm.errors import UserError
from lm.runs.saved_params import mean_params, saved_checkpoints
from lm.runs.workdir import saved_metadata
from lm.train_step import TrainState
from lm.training.results import BestCheckpoint
from lm.training.trainer import train


def state_at(step: int) -> TrainState:
    return TrainState(jnp.asarray(step), {"w": jnp.full(3, float(step))}, {}, {})


def kept(run: Path) -> tuple[int, float]:
    """Step of the one checkpoint in a run's folder "best", and its parameter."""
    (saved,) = saved_checkpoints(run / "best", pytest.fail)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params, _ = mean_params([saved], 1, {"w": one}, pytest.fail)
    return saved.step, float(params["w"][0])


@pytest.fixture
def offer(tmp_path):
    """Offers states by a figure, one after the other, as one start of a run."""

    def offer(figure: str, found: dict[int, dict[str, float]]) -> Path:
        metadata = {"config": {}, "fingerprint": {}}
        config = default()
        config.eval.best = figure
        best = BestCheckpoint(tmp_path, config, metadata)
        for step, figures in found.items():
            best.offer(step, state_at(step), figures)
        best.close()
        return tmp_path

    return offer


def test_higher_is_better_by_default(offer):
    figures = {2: 0.5, 4: 0.75, 6: 0.75, 8: 0.6}
    found = {step: {"loss": step, "accuracy": value} for step, value in figures.items()}
    assert kept(offer("accuracy", found)) == (4, 4.0)


def test_lower_is_better_with_a_minus_sign(offer):
    losses = {2: math.nan, 4: 3.0, 6: 1.5, 8: math.nan, 10: 2.0}
    run = offer("-loss", {step: {"loss": value} for step, value in losses.items()})
    assert kept(run) == (6, 6.0)


@pytest.mark.parametrize("figure", ["accuracy", "-loss"])
def test_restart_continues_from_the_kept_best(offer, figure):
    sign = -1 if figure == "-loss" else 1
    name = figure.removeprefix("-")
    offer(figure, {2: {name: sign * 1.0}, 4: {name: sign * 5.0}})
    assert kept(offer(figure, {6: {name: sign * 4.0}}))[0] == 4
    assert kept(offer(figure, {8: {name: sign * 6.0}}))[0] == 8


def test_steps_that_a_restart_repeats_change_nothing(offer):
    """On another mesh they may come out a little better than what was kept."""
    offer("accuracy", {2: {"accuracy": 0.5}, 4: {"accuracy": 0.6}})
    repeated = {2: {"accuracy": 0.51}, 4: {"accuracy": 0.62}}
    assert kept(offer("accuracy", repeated)) == (4, 4.0)
    assert kept(offer("accuracy", repeated | {6: {"accuracy": 0.61}})) == (6, 6.0)


def test_unknown_figure_names_those_there_are(offer):
    with pytest.raises(UserError, match=r"eval.best=acuracy is not one of .*: loss, accuracy"):
        offer("-acuracy", {2: {"loss": 1.0, "accuracy": 0.0}})


def test_damage_is_named(offer):
    run = offer("accuracy", {2: {"accuracy": 0.5}})
    (metadata,) = run.glob("best/checkpoints/2/metadata/metadata")
    metadata.write_text("{")
    with pytest.raises(UserError, match=r"best/checkpoints/2 is damaged .*: move it away"):
        offer("accuracy", {4: {"accuracy": 0.6}})


def test_there_must_be_something_to_compare(tiny_config, tmp_path):
    config = tiny_config(
        eval__best="-loss", data__validation_source="", data__validation_fraction=0.0
    )
    with pytest.raises(UserError, match=r"--config.eval.best=-loss needs validation data"):
        train(config, tmp_path / "run")
    for key in ("max_batches", "final_batches"):
        with pytest.raises(UserError, match=rf"--config.eval.{key}=2 must be 0"):
            train(tiny_config(eval__best="-loss", **{f"eval__{key}": 2}), tmp_path / "run")


def test_best_is_evaluated(tiny_config, tmp_path, monkeypatch, capsys):
    """A run that gets worse: what it kept is that of the evaluation with the least loss."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: devices)
    run = tmp_path / "run"
    config = tiny_config(
        data__sequence_length=16,
        optimizer__learning_rate=0.5,
        optimizer__name="sgd",
        schedule__name="constant",
        eval__every_steps=2,
        eval__best="-loss",
        train__steps=8,
    )
    assert train(config, run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    name = "eval/validation/loss"
    losses = {row["step"]: row[name] for row in rows if name in row}
    assert list(losses) == [2, 4, 6, 8]
    best = min(losses, key=losses.__getitem__)
    capsys.readouterr()
    for words, step in ((["--best"], best), ([], 8)):
        assert main(["eval", "--workdir", str(run), "--json", *words]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["step"] == step
        assert report[name] == pytest.approx(losses[step], rel=1e-5)
    metadata = saved_metadata(run / "best" / "checkpoints" / str(best))
    assert metadata["loss"] == np.float32(losses[best])
    assert main(["eval", "--workdir", str(run), "--best", "--average", "2"]) == 2
    assert "cannot average 2 checkpoints" in capsys.readouterr().err


def test_run_without_best_checkpoint_is_reported(tiny_config, tmp_path, monkeypatch, capsys):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: devices)
    assert train(tiny_config(data__sequence_length=16, train__steps=1), tmp_path)
    assert not (tmp_path / "best").exists()
    assert main(["eval", "--workdir", str(tmp_path), "--best"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: no checkpoint in {tmp_path}/best"
