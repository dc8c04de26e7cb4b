"""Fine-tuning from one run to the next: freezing, low-rank adaptation, merging, resuming."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import losses, saved_state

from lm.errors import UserError
from lm.experiment import build
from lm.models.variables import flat, nested
from lm.runs.saved_params import merge_run, restore_params
from lm.runs.workdir import MERGED_OVERRIDES, load_run_config
from lm.training import warm_start
from lm.training.trainer import train

pytestmark = pytest.mark.usefixtures("one_device")
LORA = {"lora__rank": 2, "lora__targets": "attention/(query|out)", "optimizer__learning_rate": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def source(tiny_config, folder):
    """A trained run."""
    run = folder / "source"
    if not run.exists():
        train(tiny_config(data__sequence_length=16), run)
    return run


@pytest.fixture
def tune(tiny_config, source):
    """Train a run from `source`; its folder is returned."""

    def tune(run: Path, **changes) -> Path:
        train(tiny_config(data__sequence_length=16, init__from=str(source), **changes), run)
        return run

    return tune


@pytest.fixture
def adapted(tune, folder):
    """A run that adapted `source`."""
    run = folder / "adapted"
    return run if run.exists() else tune(run, **LORA)


def assert_same(left, right, paths):
    assert paths
    for path in paths:
        assert np.asarray(left[path]).tobytes() == np.asarray(right[path]).tobytes(), path


def plain(run: Path, average: int = 1):
    """An experiment without adapters, and the parameters that a run left for it."""
    experiment = build(load_run_config(run, MERGED_OVERRIDES), jax.devices())
    return experiment, restore_params(experiment, run, print, average)[0]


def test_frozen_parameters_keep_every_bit(tune, source, tmp_path):
    before = saved_state(source)
    after = saved_state(tune(tmp_path, optimizer__freeze="tokens,layers/0/,norm"))
    paths = [path for path in before if path.startswith("params/")]
    whole = [path for path in paths if "tokens" in path or "norm" in path]
    assert_same(before, after, whole)
    moments = [path for path in after if path.startswith("opt_state/") and "stack" in path]
    assert moments
    assert not any("norm" in path for path in moments)
    for path in set(paths) - set(whole):
        if "/layers/" in path:
            assert before[path][0].tobytes() == after[path][0].tobytes(), path
            assert (before[path][1] != after[path][1]).any(), path
        else:
            assert (before[path] != after[path]).any(), path


def test_adaptation_trains_its_own_parameters_only(adapted, source):
    before, after = saved_state(source), saved_state(adapted)
    base = [path for path in before if path.startswith("params/")]
    assert_same(before, after, base)
    adapters = [path for path in after if path.startswith("params/lora/")]
    assert len(adapters) == 4
    assert all(after[path].any() for path in adapters)
    moments = [path for path in after if path.startswith("opt_state/") and "stack" in path]
    assert len(moments) == 2 * len(adapters)
    assert all("lora" in path for path in moments)


def test_adapted_run_continues_bitwise(adapted, tmp_path):
    shutil.copytree(adapted, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    train(load_run_config(tmp_path, {}), tmp_path)
    found, expected = saved_state(tmp_path), saved_state(adapted)
    assert_same(found, expected, list(expected))
    assert losses(tmp_path) == losses(adapted)


def test_int8_base_learns_similarly_and_resumes_bitwise(adapted, tune, source, tmp_path):
    run = tune(tmp_path / "run", lora__base="int8", **LORA)
    expected = losses(adapted)
    np.testing.assert_allclose(list(losses(run).values()), list(expected.values()), rtol=5e-3)
    assert losses(run) != expected
    start, state = saved_state(source), saved_state(run)
    matrices = [path for path in state if path.startswith("params/stack") and "kernel" in path]
    assert matrices
    for path in matrices:
        assert state[path].dtype == np.int8
        scale = state[path.replace("params/", "params/int8_scales/")]
        assert (abs(state[path] * scale - start[path]) <= scale * 0.501).all()
    assert not any("kernel" in path and "lora" not in path for path in state if "opt" in path)
    assert_merged_loss(run, tmp_path / "merged")
    shutil.rmtree(run / "checkpoints" / "6")
    train(load_run_config(run, {}), run)
    found = saved_state(run)
    assert_same(found, state, list(state))


def test_merged_parameters_give_the_adapted_loss(adapted, tmp_path):
    """Of the run itself, and of the run of its own that `lm merge` writes."""
    assert_merged_loss(adapted, tmp_path / "merged")


def assert_merged_loss(adapted: Path, merged: Path):
    assert merge_run(adapted, merged, 1, {}, print) == 6
    experiment = build(load_run_config(adapted, {}), jax.devices())
    rng = np.random.default_rng(0)
    batch = {
        name: rng.integers(1, 9, (1, *x.shape)).astype(x.dtype)
        for name, x in experiment.batch_shapes.items()
    }

    def loss(experiment, params):
        return float(experiment.eval_steps(params, experiment.init_carry(8), batch)[1].loss[0])

    state = saved_state(adapted)
    names = flat(experiment.state_shapes.params)
    params = {path: state[f"params/{path}"] for path in names}
    expected = loss(experiment, nested(params))
    base = {path: x for path, x in params.items() if "lora/" not in path and "int8" not in path}
    base = nested(base) | {"lora": jax.tree.map(np.zeros_like, nested(params)["lora"])}
    if "int8_scales" in nested(params):
        base["int8_scales"] = nested(params)["int8_scales"]
    for run in (adapted, merged):
        found = loss(*plain(run))
        assert found == pytest.approx(expected, rel=1e-6)
    unadapted = loss(experiment, base)
    assert abs(unadapted - expected) > 1e-3


def test_merged_run_is_whole(adapted, tune, tmp_path):
    """It is finished, has the curves of its source, and is not written twice."""
    merged = tmp_path / "merged"
    merge_run(adapted, merged, 2, {}, print)
    config = load_run_config(merged, {})
    assert config.lora.rank == 0
    assert config.init["from"] == ""
    assert train(config, merged)
    curves = [(run / "metrics.jsonl").read_text() for run in (merged, adapted)]
    assert curves[0] == curves[1]
    found, mean = flat(plain(merged)[1]), flat(plain(adapted, average=2)[1])
    assert_same(found, mean, list(mean))
    with pytest.raises(UserError, match="is not an empty folder"):
        merge_run(adapted, merged, 1, {}, print)


def test_runs_own_checkpoint_wins(adapted, tmp_path, monkeypatch):
    shutil.copytree(adapted, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(warm_start, "initial_state", None)  # nothing is asked of it
    assert train(load_run_config(tmp_path, {}), tmp_path)


def test_another_model_cannot_take_the_parameters(source):
    experiment = build(load_run_config(source, {"model.d_ff": "48"}), jax.devices())
    with pytest.raises(UserError, match="feed_forward/in/bias differs from the run"):
        restore_params(experiment, source, pytest.fail)


def test_run_without_trainable_parameters_or_with_unknown_names(tune, tmp_path):
    with pytest.raises(UserError, match="leaves no parameter to train"):
        tune(tmp_path / "a", optimizer__freeze=".")
    with pytest.raises(UserError, match="'layers/2/' matches no parameter"):
        tune(tmp_path / "b", optimizer__freeze="layers/2/")
