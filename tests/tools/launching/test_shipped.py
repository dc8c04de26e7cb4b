"""Shipped sweeps: configurations are valid, and the IsoFLOP sweep meets its budgets."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from lm import config as configs
from lm.accounting.parameter_counts import count_parameters
from lm.experiment import build
from lm.sweeps.sweep import load_sweep

FOLDER = Path(__file__).parents[3] / "experiments" / "sweeps"
RUNS = {
    "learning_rate_width": 28,
    "learning_rate_width.py:mup": 28,
    "isoflop": 13,
    "optimizers": 40,
    "search": 0,  # they are chosen one after another
    "seeds": 5,
}


def test_every_shipped_sweep_is_known():
    assert {file.stem for file in FOLDER.glob("*.py")} == {name.split(".")[0] for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_every_shipped_sweep_loads(name, tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])
    _, runs = load_sweep(str(FOLDER / (name if ".py" in name else f"{name}.py")), tmp_path, {})
    assert len(runs) == RUNS[name]
    assert len({run.name for run in runs}) == len(runs)


def test_isoflop_runs_cost_their_budget(tmp_path, monkeypatch):
    """6 N D with N as `lm scaling` counts it, all parameters."""
    monkeypatch.chdir(FOLDER.parents[1])
    _, runs = load_sweep(str(FOLDER / "isoflop.py"), tmp_path, {})
    parameters, at_budget = {}, {}
    for run in runs:
        config = configs.load_config(run.config, {**run.overrides, "parallel.mesh.data": "1"})
        width = config.model.d_model
        if width not in parameters:
            parameters[width] = count_parameters(build(config, jax.devices()[:1]))["total"]
        tokens = config.train.steps * config.data.batch_size * config.data.sequence_length
        budget = float(run.name.split(",")[0].removeprefix("flop="))
        assert 6 * parameters[width] * tokens == pytest.approx(budget, rel=0.02), run.name
        at_budget[budget] = at_budget.get(budget, 0) + 1
    assert len(at_budget) == 3
    assert min(at_budget.values()) >= 4
