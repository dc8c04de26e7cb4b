"""`lm plan --serve`: sizes of a real engine, figures by hand, and wrong inputs."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import jax
import pytest

from lm.cli import main
from lm.decoding.engine.engine import PagedEngine
from lm.decoding.engine.shapes import lower_programs
from lm.decoding.engine.sizes import EngineOptions
from lm.decoding.weights import prepare
from lm.errors import UserError
from lm.experiment import build
from lm.hardware import Chip
from lm.tools.planning.described_device import kernels_for
from lm.tools.planning.serve_plan import plan_serving, serve_plan_text
from lm.tools.planning.serve_work import shard_bytes, work_of_prompt, work_of_step
from lm.tools.planning.topologies import topology

CONTEXT, LONG, V, D, N, H, G, K, F = 64, 16384, 128, 32, 2, 4, 2, 8, 64
SIZES = {
    "model__positions": "rotary",
    "model__vocab_size": V,
    "model__n_kv_heads": G,
    "model__d_ff": F,
    "model__activation": "swiglu",
    "model__norm": "rmsnorm",
    "model__bias": False,
    "model__tie_embeddings": False,
    "data__sequence_length": CONTEXT,
    "data__tokenizer": "words",
}
KERNELS = N * (D * H * K + 2 * D * G * K + H * K * D + 3 * D * F)  # beside the output layer
HEAD, NORMS = D * V, (2 * N + 1) * D
TENSOR = {"parallel__preset": "custom", "parallel__mesh__data": 1, "parallel__mesh__tensor": 2}


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


def described(name, memory):
    """CPU devices with published rates and little memory."""
    chip = Chip(memory, peak_flops=1e12, memory_bandwidth=1e9)
    return replace(topology(name), chip=chip)


@pytest.mark.parametrize(
    ("n_devices", "changes", "row"),
    [
        # float32 keys and values of one of two heads; in int8 a vector of 8 has a scale of 4 bytes
        (2, TENSOR, N * 2 * LONG * (G // 2) * K * 4),
        (1, {"decode__weights": "int8", "decode__cache": "int8"}, N * 2 * LONG * G * (K + 4)),
    ],
)
def test_sizes_match_a_real_engine(tiny_config, n_devices, changes, row):
    config = tiny_config(**SIZES, **changes)
    experiment = build(config, jax.devices()[:n_devices])
    params = jax.jit(experiment.init_state, out_shardings=experiment.state_sharding)().params
    weights = shard_bytes(prepare(experiment, params)[1])
    # Pages may have 0.85 of what the weights leave: four rows, not eight.
    devices = described(f"cpu:{n_devices}", weights + int(6 * row / 0.85))
    plan = plan_serving(config, devices, context=LONG)
    engine = PagedEngine(experiment, params, EngineOptions(plan.rows, LONG))
    memory = plan.memory
    assert plan.fits
    assert (plan.rows, plan.context, plan.tokens_per_row) == (4, LONG, LONG)
    assert plan.pages == engine.statistics().n_pages == 4 * LONG // 32
    assert memory.weights == shard_bytes(engine._params) == weights
    assert memory.pages == shard_bytes(engine._state.pages) == 4 * row
    assert memory.texts + memory.pages == shard_bytes(engine._state)
    assert memory.needed == weights + shard_bytes(engine._state) + memory.temporaries
    assert plan.step.memory == pytest.approx((weights - table_bytes(engine) + 4 * row) / 1e9)
    assert plan.tokens_per_second == 4 / plan.step.bound
    assert json.loads(json.dumps(plan.as_json()))["memory"]["pages"] == 4 * row
    assert "4 rows, context 16,384" in serve_plan_text(plan)


def described_shapes(experiment):
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        experiment.inference_shapes,
        experiment.inference_sharding,
    )


def table_bytes(engine):
    return shard_bytes(engine._params["tokens"])


def test_work_of_a_step_and_of_a_prompt_by_hand(tiny_config):
    """One row of 64 tokens in its cache; a prompt of 63 in chunks of 32."""
    experiment = build(tiny_config(**SIZES, model__dtype="bfloat16"), jax.devices()[:1])
    prepared = prepare(experiment, described_shapes(experiment))
    step = work_of_step(*prepared, EngineOptions(3), 2)
    assert step.flops == 2 * 3 * (KERNELS + HEAD) + 4 * N * H * K * CONTEXT
    cached = N * 2 * G * K * 4  # a CPU's cache is in float32, and norms are too
    assert step.bytes == 2 * (KERNELS + HEAD) + 4 * NORMS + cached * CONTEXT
    first, second = work_of_prompt(*prepared, EngineOptions(3, chunk=32))
    assert first.flops == 2 * (32 * KERNELS + HEAD) + 4 * N * H * K * 32**2 / 2
    assert second.flops == 2 * (31 * KERNELS + HEAD) + 4 * N * H * K * (31 * 32 + 31**2 / 2)
    assert second.bytes - first.bytes == 32 * cached


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_layers_are_lowered_for_the_devices_that_are_described(tiny_config):
    """Products of experts by Pallas on one chip, and by XLA on several, which shards them.

    Attention, with biases of its scores, is plain JAX on both.
    """
    pallas, chips = [], ("v5e:1x1", "v5e:2x2")
    for name in chips:
        devices = topology(name).devices
        changes = {"model__n_experts": 4, "model__positions": "alibi", "parallel__preset": "fsdp"}
        experiment = build(tiny_config(**SIZES | changes), devices)
        prepared = prepare(experiment, described_shapes(experiment))
        with kernels_for(experiment.mesh.devices):
            programs = lower_programs(*prepared, EngineOptions(2), 4)
        pallas.append("tpu_custom_call" in programs["chunk"].as_text())
    assert pallas == [True, False]


def test_wrong_words_are_one_line_errors(tiny_config, experiment_file, capsys):
    """And what the engine cannot serve."""
    plan = ["plan", "--config", experiment_file, "--topology", "cpu:1"]
    for words, named in {
        ("--serve", "--decode"): "--decode",
        ("--serve", "--search"): "--search",
        ("--rows", "2"): "--serve",
        ("--serve", "--rows", "0"): "--rows",
        ("--serve", "--context", "1"): "1 token",
        ("--serve", "--context", "17"): "16 positions",
    }.items():
        assert main([*plan, *words]) == 2
        assert named in capsys.readouterr().err
    for changes in (
        {"model__family": "encoder", "objective__name": "masked"},
        {"model__family": "lstm"},
        {"parallel__preset": "custom", "parallel__mesh__stage": 2},
    ):
        with pytest.raises(UserError, match="--decode"):
            plan_serving(tiny_config(**changes), topology("cpu:2"))
