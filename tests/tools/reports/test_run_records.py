"""Records of runs, and the analysis of their curves."""

import json
from dataclasses import replace

import numpy as np
import pytest
from runs import write_run

from lm.errors import UserError
from lm.tools.reports.report_page import positions
from lm.tools.reports.run_records import (
    POINTS,
    downsample,
    find_runs,
    group_runs,
    incidents,
    read_run,
    smooth,
    spikes,
    swept_keys,
)


def test_positions_on_every_axis(tmp_path):
    run = read_run(write_run(tmp_path / "a", {}, losses=[3.0, 2.0, 1.0]), "a")
    steps = run.curves["loss"].steps
    assert positions(run, "step", steps).tolist() == [1, 2, 3]
    assert positions(run, "tokens", steps).tolist() == [32, 64, 96]  # 4 rows of 8
    assert positions(run, "time", steps).tolist() == [0.5, 1.0, 1.5]
    flops = positions(run, "FLOPs", steps)
    # 6 × (24·d² of two blocks and d·64 of the tied output) and causal attention's 12·L·d·T/2
    assert flops[0] == 32 * (6 * (24 * 16**2 + 16 * 64) + 12 * 2 * 16 * 8 / 2)


def test_tokens_match_ramps(tmp_path):
    """Also where the batch size changed in a run whose rows grow."""
    ramps = {"data.batch_ramp": "0: 1; 2: 4", "data.length_ramp": "0: 2; 3: 8"}
    run = read_run(write_run(tmp_path / "a", ramps, losses=[3.0] * 5), "a")
    sizes = np.array([1 * 2, 1 * 2, 4 * 2, 4 * 8, 4 * 8])
    assert positions(run, "tokens", np.arange(6)).tolist() == [0, *sizes.cumsum()]
    assert run.tokens == sizes.sum()
    longer = write_run(tmp_path / "b", ramps | {"data.batch_ramp": ""}, losses=[3.0] * 5)
    history = ({"step": 4, "changed": {"data.batch_size": [2, 4]}},)
    changed = replace(read_run(longer, "b"), history=history)
    assert changed.tokens == 2 * (2 + 2 + 2 + 8) + 4 * 8


def test_size_needs_neither_the_mesh_nor_the_kernel(tmp_path):
    here = write_run(tmp_path / "a", {}, losses=[1.0])
    there = write_run(tmp_path / "b", {"parallel.mesh.fsdp": 64, "data.batch_size": 64}, [1.0])
    small, large = read_run(here, "a").size, read_run(there, "b").size
    assert large.parameters == small.parameters
    assert large.tokens_per_step == 16 * small.tokens_per_step


def test_half_written_line_is_ignored_and_damaged_one_reported(tmp_path):
    folder = write_run(tmp_path / "a", {}, losses=[3.0, None])
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 3, "lo')
    curve = read_run(folder, "a").curves["loss"]
    assert curve.steps.tolist() == [1, 2]
    assert np.isnan(curve.values[1])
    metrics.write_text('{"step": 1, "loss"\n' + metrics.read_text())
    damaged = read_run(folder, "a")
    assert "line 1: damaged JSON" in damaged.damage[0]
    assert damaged.curves["loss"].steps.tolist() == [1, 2]


def test_incidents(tmp_path):
    quiet = write_run(tmp_path / "quiet", {}, losses=list(np.linspace(5, 1, 60)))
    assert incidents(read_run(quiet, "quiet")) == []
    losses = [*np.linspace(5, 2, 60), 8.0, *np.linspace(2, 1, 20), None]
    clock = {"starts": 3, "steps_computed": 90}
    folder = write_run(tmp_path / "a", {"train.steps": 100}, losses, clock=clock)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1]) | {"skipped": 1.0, "seconds_per_step": 60.0}
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    assert incidents(read_run(folder, "a")) == [
        "stopped at step 82 of 100",
        "loss not finite at step 82",
        "update skipped at step 82",
        "restarted: 3 starts",
        "8 steps recomputed after a restart",
        "loss jumped at step 61",
        "more than 10× slower than usual for 1 min 0 s, step 82",
    ]


def test_swept_keys_and_lines(tmp_path):
    for width in (16, 32):
        for rate in (0.1, 0.01):
            values = {"model.d_model": width, "optimizer.learning_rate": rate}
            write_run(tmp_path / f"{width}-{rate}", values, losses=[1.0])
    runs = find_runs(tmp_path)
    groups = swept_keys(runs)
    assert [group[0] for group in groups] == ["model.d_model", "optimizer.learning_rate"]
    assert "model.d_ff" in groups[0]  # follows from the width
    found = group_runs(runs, "optimizer.learning_rate", ["model.d_model"])
    names = {key: [run.name for run in line] for key, line in found.items()}
    assert names == {(16,): ["16-0.01", "16-0.1"], (32,): ["32-0.01", "32-0.1"]}


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        find_runs(tmp_path)


def test_smoothing_is_an_average_of_both_sides_that_ignores_nan():
    values = np.random.default_rng(0).normal(size=300)
    values[7] = np.nan
    distances = np.abs(np.arange(300)[:, None] - np.arange(300))
    weights = 0.5 ** (distances / 3)  # half-life: 1 % of 300 steps
    expected = np.nansum(weights * values, axis=1) / (weights @ np.isfinite(values))
    np.testing.assert_allclose(smooth(values), expected, rtol=1e-9, atol=1e-12)


def test_downsampling_keeps_ends_and_extremes():
    y = np.random.default_rng(0).normal(size=10_000)
    y[[1234, 8765]] = 50, -50
    kept_x, kept_y = downsample(np.arange(10_000), y)
    assert len(kept_x) <= POINTS + 2
    assert {0, 1234, 8765, 9999} <= set(kept_x)
    assert kept_y.tolist() == y[kept_x].tolist()


def test_noise_and_a_steep_start_are_no_spikes():
    steps = np.arange(1000)
    loss = 1 + 9 * np.exp(-steps / 10) + np.random.default_rng(0).normal(0, 0.05, 1000)
    assert spikes(loss).tolist() == []
    loss[600] += 3
    assert spikes(loss).tolist() == [600]
