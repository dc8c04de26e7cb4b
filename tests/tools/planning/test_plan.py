"""`lm plan`: its JSON, its text and its errors."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import pytest

from lm.cli import main
from lm.tools.planning import plan as planning
from lm.tools.planning.plan import make_plan
from lm.tools.planning.plan_report import plan_text
from lm.tools.planning.program import OutOfMemory
from lm.tools.planning.topologies import topology


@pytest.fixture
def experiment_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(
        "from lm.config import default\n"
        "def get_config():\n"
        "    config = default()\n"
        "    config.model.d_model, config.model.n_layers = 32, 2\n"
        "    config.model.vocab_size, config.data.sequence_length = 64, 16\n"
        "    return config\n"
    )
    return str(path)


def test_step_of_decoding_reads_weights_and_cache(experiment_file, capsys):
    rows, length = 3, 16
    words = ["--topology", "cpu:1", "--decode", f"--config.decode.batch_size={rows}"]
    assert main(["plan", "--config", experiment_file, *words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["cache"] == 4 * (2 * 2 * rows * length * 32 + rows * length + 1)
    assert plan["bound"] == plan["weights"] + plan["cache"]
    assert plan["traffic"] > 0.5 * plan["weights"]
    assert main(["plan", "--config", experiment_file, *words, "--search"]) == 2
    assert "--decode" in capsys.readouterr().err


def test_json_has_what_scripts_rely_on(experiment_file, capsys):
    words = ["--topology", "cpu:8", "--config.parallel.preset=fsdp", "--json"]
    assert main(["plan", "--config", experiment_file, *words]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is True
    memory = plan["memory"]
    named = {"parameters", "optimizer", "arguments", "temporaries", "total", "capacity"}
    assert named <= set(memory)
    assert 0 < memory["parameters"] < memory["optimizer"] < memory["arguments"] < memory["total"]
    assert plan["flops"]["model"] > 0
    assert plan["flops"]["compiled"] > 0
    assert plan["mesh"] == {"fsdp": 8}
    assert {c["axis"] for c in plan["collectives"]} == {"fsdp"}
    for collective in plan["collectives"]:
        assert {"kind", "axis", "count", "bytes", "asynchronous"} <= set(collective)
    # Nobody publishes what this machine's cores can do.
    assert plan["time"] is plan["bottleneck"] is plan["tokens_per_second"] is plan["mfu"] is None
    assert plan["attention_kernel"] == "xla"
    assert plan["compile_seconds"] > 0


def test_tokens_and_flops_match_sources_and_targets(make_kind):
    """Sources of 16 and targets of 12; wide enough that products outweigh attention and padding."""
    config = make_kind("seq2seq encoder_decoder", **{"model.d_model": 128, "data.batch_size": 8})
    config.data.sequence_length, config.data.target_length = 16, 12
    plan = make_plan(config, topology("cpu:1"))
    assert plan.tokens == 8 * (16 + 12)
    assert plan.compiled_flops == pytest.approx(plan.model_flops, rel=0.1)


def test_errors_are_one_line_errors(experiment_file, capsys):
    assert main(["plan", "--config", experiment_file, "--topology", "v5p"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    words = ["--topology", "cpu:8", "--config.parallel.mesh.tensor=3"]
    assert main(["plan", "--config", experiment_file, *words]) == 2
    assert "does not divide 8 devices" in capsys.readouterr().err


def test_program_that_does_not_fit_is_a_result_with_sizes(tiny_config, monkeypatch):
    largest = ((5 * 10**9, "f32[2,3] attention"),)
    found = OutOfMemory(20 * 10**9, 16 * 10**9, largest, seconds=1.0)
    monkeypatch.setattr(planning, "compile_step", lambda experiment: found)
    plan = make_plan(tiny_config(), topology("cpu:8"))
    assert not plan.fits
    assert plan.memory.total == 20 * 10**9
    assert plan.as_json()["flops"]["compiled"] is None
    text = plan_text(plan)
    assert "DOES NOT FIT, 4.000 GB too much" in text
    assert "f32[2,3] attention" in text


def test_report_shows_memory_work_communication_and_time(tiny_config):
    plan = make_plan(tiny_config(parallel__preset="fsdp"), topology("cpu:8"))
    timed = replace(plan, time=planning.Time(1e-3, 2e-3, 3e-3, 3e-3), peak_flops=1e12)
    text = plan_text(timed)
    for part in ("8 devices (fsdp=8)", "fits, ", "optimizer state", "all-gather", "(network)"):
        assert part in text
    n = sum(leaf.size for leaf in jax.tree.leaves(plan_params(tiny_config)))
    assert f"{n:,} parameters" in text


def plan_params(tiny_config):
    from lm.experiment import build

    return build(tiny_config(), jax.devices()[:1]).state_shapes.params
