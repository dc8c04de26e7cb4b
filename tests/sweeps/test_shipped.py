"""The sweeps that are shipped: every run's configuration is valid, IsoFLOP's budgets are met."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import pytest

from lm import config as configs
from lm.experiment import build
from lm.flops import model_flops_per_token
from lm.sweeps.sweep import load

FOLDER = Path(__file__).parents[2] / "experiments" / "sweeps"
RUNS = {"learning_rate_width": 28, "isoflop": None, "optimizers": 25, "seeds": 5}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_every_shipped_sweep_loads(file, tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])
    _, runs = load(str(file), tmp_path, {})
    assert len(runs) == (RUNS[file.stem] or len(runs))
    assert len({run.name for run in runs}) == len(runs)


def test_isoflop_runs_cost_their_budget(tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])
    _, runs = load(str(FOLDER / "isoflop.py"), tmp_path, {})
    spec = importlib.util.spec_from_file_location("isoflop", FOLDER / "isoflop.py")
    isoflop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(isoflop)
    budgets = [float(text) for text in isoflop.BUDGETS.split(",")]
    at_budget = dict.fromkeys(budgets, 0)
    for run in runs:
        config = configs.load(run.config, run.overrides)
        counted = isoflop.flops_per_token(config.model.n_layers, config.model.d_model)
        tokens = config.train.steps * config.data.batch_size * config.data.sequence_length
        budget = min(budgets, key=lambda b: abs(b - counted * tokens))
        assert counted * tokens == pytest.approx(budget, rel=0.02), run.name
        at_budget[budget] += 1
    assert min(at_budget.values()) >= 4
    config = configs.load(runs[0].config, {**runs[0].overrides, "parallel.preset": "data"})
    experiment = build(config, jax.devices()[:1])
    counted = isoflop.flops_per_token(config.model.n_layers, config.model.d_model)
    assert model_flops_per_token(experiment) == pytest.approx(counted, rel=1e-12)
