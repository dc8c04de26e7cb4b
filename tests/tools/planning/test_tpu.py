"""Plans for TPUs by the real TPU compiler: collectives and shardings.

`golden/NAME.json` holds the sharding of every parameter and the collectives of an experiment, made
tiny, on a small slice, `golden/memory.json` the temporaries of some; a difference names what
changed. After a change that is meant: `python tests/tools/planning/test_tpu.py` writes the files
again.
"""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from axes import axes_of
from jax.sharding import SingleDeviceSharding

from lm.config import load_config, set_value
from lm.experiment import build
from lm.hardware import compiler_options
from lm.kernels.dot_product_attention import AttentionMask
from lm.kernels.flash_attention import flash_attention
from lm.models.sharded_linear import product_on_mesh
from lm.models.variables import flat
from lm.parallel.mesh import (
    activation_sharding,
    axis_sizes,
    make_mesh,
    parameter_sharding,
    use_mesh,
)
from lm.tools.planning.hlo import parse_hlo
from lm.tools.planning.plan import Plan, make_plan
from lm.tools.planning.topologies import topology
from lm.tools.planning.work import attention_kernel, flops

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")

GOLDEN = Path(__file__).with_name("golden")
EXPERIMENTS = Path(__file__).parents[3] / "experiments"
TINY = {
    "model.n_layers": 2,
    "model.d_model": 256,
    "model.n_heads": 2,
    "model.n_kv_heads": 2,
    "model.head_dim": 128,
    "model.d_ff": 512,
    "model.vocab_size": 1024,
    "model.max_length": 0,
    "model.dropout": 0.0,
    "model.attention_dropout": 0.0,
    "data.sequence_length": 256,
    "data.batch_size": 8,
    "train.loss_chunk": 0,
}
FSDP = {"parallel.preset": "fsdp", "train.remat": "full"}
# Experiment, topology, what is set beside TINY.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2-data": ("gpt2.py:124m", "v5e:2x2", {}),
    "llama-fsdp": ("llama.py:2-7b", "v5e:2x4", FSDP),
    "llama-fsdp-tensor": (
        "llama.py:2-7b",
        "v5e:2x2",
        {
            "parallel.mesh.data": 1,
            "parallel.mesh.fsdp": 2,
            "parallel.mesh.tensor": 2,
            "train.remat": "none",
        },
    ),
    "llama-tensor": (
        "llama.py:2-7b",
        "v5e:2x2",
        {
            "parallel.mesh.data": 1,
            "parallel.mesh.tensor": 4,
            "model.n_heads": 4,
            "model.n_kv_heads": 4,
            "train.remat": "full",
            "train.loss_chunk": 128,
        },
    ),
    "llama-context-fsdp": (
        "llama.py:2-7b",
        "v5e:2x2",
        {
            "parallel.mesh.data": 1,
            "parallel.mesh.fsdp": 2,
            "parallel.mesh.context": 2,
            "data.sequence_length": 1024,
            "train.remat": "full",
        },
    ),
    "mixtral-expert": (
        "mixtral.py:8x7b",
        "v5e:2x2",
        {
            "parallel.mesh.data": 1,
            "parallel.mesh.expert": 4,
            "model.n_experts": 4,
            "model.expert_capacity": 1.0,
            "train.remat": "none",
        },
    ),
    "mixtral-expert-fsdp": (
        "mixtral.py:8x7b",
        "v5e:2x4",
        {
            "parallel.mesh.data": 1,
            "parallel.mesh.expert": 2,
            "parallel.mesh.fsdp": 4,
            "train.remat": "full",
        },
    ),
    "bert-fsdp": ("bert.py:base", "v5e:2x2", FSDP),
    "t5-fsdp": ("t5.py:1.1-small", "v5e:2x2", {**FSDP, "model.n_decoder_layers": 2}),
}
WITH_MEMORY = ("llama-fsdp", "llama-fsdp-tensor", "llama-tensor")


@cache
def plan_of(case: str) -> Plan:
    return make_plan(config_of(case), topology(CASES[case][1]))


def config_of(case: str) -> Any:
    experiment, _, changes = CASES[case]
    config = load_config(str(EXPERIMENTS / experiment))
    for path, value in {**TINY, **changes}.items():
        set_value(config, path, value)
    return config


@cache
def experiment_of(case: str) -> Any:
    return build(config_of(case), topology(CASES[case][1]).devices)


def golden_of(case: str) -> dict[str, Any]:
    shardings = flat(experiment_of(case).state_sharding.params)
    return {
        "parameters": {path: axes_of(shardings[path]) for path in sorted(shardings)},
        # Kind, axis, count, bytes; the few bytes of loss and norms aside.
        "collectives": [
            f"{c.kind} {c.axis} {c.count} {c.bytes}"
            for c in sorted(plan_of(case).collectives, key=lambda c: (c.kind, c.axis, c.count))
            if c.bytes > 1000
        ],
    }


@pytest.mark.parametrize("case", CASES)
def test_golden_shardings_and_collectives(case):
    expected = json.loads((GOLDEN / f"{case}.json").read_text())
    assert golden_of(case) == expected


@pytest.mark.parametrize("case", WITH_MEMORY)
def test_golden_memory(case):
    expected = json.loads((GOLDEN / "memory.json").read_text())
    assert plan_of(case).memory.temporaries == expected[case]


def bytes_by_kind(case: str) -> dict[str, int]:
    sizes = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce", "all-to-all"), 0)
    for c in plan_of(case).collectives:
        sizes[c.kind] = sizes.get(c.kind, 0) + c.bytes
    return sizes


def test_data_parallel_sums_gradients_and_gathers_nothing():
    plan = plan_of("gpt2-data")
    assert {(c.kind, c.axis) for c in plan.collectives} == {("all-reduce", "data")}
    summed = sum(c.bytes for c in plan.collectives)
    assert summed == pytest.approx(4 * plan.parameters, rel=0.15)


@pytest.mark.parametrize("case", ["llama-fsdp", "bert-fsdp", "t5-fsdp"])
def test_fsdp_gathers_twice_scatters_once_and_sums_no_whole_parameter(case):
    """With full rematerialization the layers are gathered forward and backward, in bfloat16."""
    assert {c.axis for c in plan_of(case).collectives} == {"fsdp"}
    experiment, sizes = experiment_of(case), bytes_by_kind(case)
    shardings = flat(experiment.state_sharding.params)
    shapes = flat(experiment.state_shapes.params)
    cut = {path: leaf.size for path, leaf in shapes.items() if "fsdp" in axes_of(shardings[path])}
    layers = sum(size for path, size in cut.items() if "layers" in path)
    assert sizes["all-gather"] >= 2 * 2 * layers
    assert sizes["reduce-scatter"] >= 2 * sum(cut.values())
    # Norms, biases and scalars, which lie on every device, are summed, together less than a matrix.
    assert sizes["all-reduce"] < 2 * TINY["model.d_model"] ** 2


def test_whole_gradients_of_cut_kernels_do_not_wait_for_the_end():
    """Of six maps in a row, each gradient is summed and cut before the next is computed."""
    devices, width = topology("v5p:2x2x2").devices, 1024
    mesh = make_mesh(axis_sizes("fsdp", {}, len(devices)), devices)
    names = [("embed", "mlp"), ("mlp", "embed")] * 3

    def loss(kernels, x_BLD):
        for kernel, own in zip(kernels, names, strict=True):
            y = product_on_mesh(x_BLD, kernel, own, (jnp.bfloat16, jnp.bfloat16), False)
            x_BLD = jnp.tanh(y).reshape(x_BLD.shape)
        return x_BLD.astype(jnp.float32).sum()

    with use_mesh(mesh):
        cut = [parameter_sharding(mesh, own, (width, width)) for own in names]
        rows = activation_sharding("batch", "length", "embed")
        kernels = [jax.ShapeDtypeStruct((width, width), jnp.float32, sharding=s) for s in cut]
        x_BLD = jax.ShapeDtypeStruct((len(devices), 256, width), jnp.bfloat16, sharding=rows)
        step = jax.jit(
            jax.grad(loss), out_shardings=cut, compiler_options=compiler_options(devices[0])
        )
        memory = step.lower(kernels, x_BLD).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 4 * width**2


def test_parts_of_a_sequence_share_parameters_and_pass_keys_on():
    """Arguments are a quarter of the state, and nothing is as large as a row of all queries."""
    plan = plan_of("llama-context-fsdp")
    assert plan.memory.arguments < 12 * plan.parameters / 4 * 1.1
    assert plan.memory.temporaries < 12e6
    moved = {(c.kind, c.axis) for c in plan.collectives if c.bytes > 1e5}
    assert ("collective-permute", "context") in moved
    assert not {kind for kind, axis in moved if axis == "context"} - {"collective-permute"}
    assert plan.attention_kernel == "splash"
    assert plan.compiled_flops < 1.4 * plan.model_flops


def test_experts_exchange_tokens_and_stay_where_they_are():
    found = {c.kind for c in plan_of("mixtral-expert").collectives if c.bytes > 1000}
    assert found == {"all-to-all", "all-reduce"}


def test_without_capacity_tokens_are_gathered_and_gradients_of_experts_scattered():
    plan = plan_of("mixtral-expert-fsdp")
    found = {(c.kind, c.axis) for c in plan.collectives if c.bytes > 1e5}
    assert {("all-gather", "expert"), ("reduce-scatter", "expert")} <= found
    assert {("all-gather", "fsdp"), ("reduce-scatter", "fsdp")} <= found
    kernels = 3 * 8 * TINY["model.d_model"] * TINY["model.d_ff"] * TINY["model.n_layers"]
    summed = sum(c.bytes for c in plan.collectives if c.kind == "all-reduce")
    assert summed < kernels / 2


@pytest.mark.parametrize("case", ["llama-fsdp-tensor", "llama-tensor"])
def test_activations_cross_the_tensor_axis_in_bfloat16_gathered_and_scattered(case):
    """Two gathers and two scatters a layer forward and backward, and what remat repeats of them;
    embeddings and logits one each. All-reduces of float32 would be four times as much, and a table
    sharded by vocabulary is looked up without gathering it.
    """
    fsdp = 2 if "fsdp" in case else 1
    stream = 8 * TINY["data.sequence_length"] * TINY["model.d_model"] * 2 // fsdp
    crossed = {"all-gather": 0, "reduce-scatter": 0, "all-reduce": 0}
    for c in plan_of(case).collectives:
        if c.axis == "tensor":
            crossed[c.kind] += c.bytes
    train = config_of(case).train
    scattered = 5 if train.remat == "full" else 4
    gathered = 6 * TINY["model.n_layers"] + 2 + bool(train.loss_chunk)  # chunks once more
    assert crossed["all-gather"] <= gathered * stream
    assert crossed["reduce-scatter"] <= (scattered * TINY["model.n_layers"] + 2) * stream
    assert crossed["all-reduce"] < stream


def test_flops_match_the_model_and_what_full_remat_repeats():
    """Two thirds more forward passes than none: 4/3 of the products, less the last product of
    each block, whose result nobody needs again."""
    ratio = {
        case: plan.compiled_flops / plan.model_flops
        for case in ("gpt2-data", "llama-fsdp")
        if (plan := plan_of(case)).compiled_flops
    }
    assert 1.0 < ratio["gpt2-data"] < 1.15
    assert 1.2 < ratio["llama-fsdp"] < 1.45


def test_attention_is_splash():
    assert plan_of("llama-fsdp").attention_kernel == "splash"


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:1x1", "v5p:2x2x1", "v6e:1x1", "7x:2x2x1"])
def test_flash_kernel_compiles_with_all_its_parts_for_every_chip(name):
    on_device = SingleDeviceSharding(topology(name).devices[0])
    shapes = {
        **dict.fromkeys(("q", "k", "v"), ((2, 300, 2, 64), jnp.bfloat16)),
        "bias_HD": ((2, 599), jnp.float32),
        "words_BHW": ((2, 2, 2), jnp.uint32),
        **dict.fromkeys(("segments", "prefix"), ((2, 300), jnp.int32)),
    }
    arrays = {n: jax.ShapeDtypeStruct(*s, sharding=on_device) for n, s in shapes.items()}

    def loss(q, k, v, bias_HD, words_BHW, segments, prefix):
        mask = AttentionMask(True, segments, prefix_BS=prefix, window=100)
        options = {"bias_HD": bias_HD, "words_BHW": words_BHW, "rate": 0.1, "softcap": 30.0}
        return flash_attention(q, k, v, mask, scale=0.125, **options).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, range(4))).lower(*arrays.values()).compile()
    module = parse_hlo(compiled.as_text())
    # A tile of 320 queries and 384 keys; two products in the forward, five in the backward pass.
    assert flops(module) == 7 * 2 * 2 * 2 * 320 * 384 * 64
    assert attention_kernel(module) == "flash"


def test_step_that_does_not_fit_lists_its_largest_arrays():
    """Logits of 1,024 rows of 256 tokens, 32,768 words: 4 bytes each are twice the memory."""
    config = config_of("gpt2-data")
    set_value(config, "model.vocab_size", 32_768)
    set_value(config, "data.batch_size", 4 * 1024)
    plan = make_plan(config, topology("v5e-4"))
    assert not plan.fits
    assert plan.memory.total > plan.memory.capacity > 0
    assert plan.largest[0][0] == 4 * 1024 * 256 * 32_768
    assert plan.largest[0][1].startswith("f32[1024,256,32768] jvp(Decoder.logits)/")
    assert len(plan.largest) > 5


def test_time_is_bound_by_the_largest_term():
    plan = plan_of("llama-fsdp")
    time = plan.time
    assert time is not None
    assert plan.fits
    assert time.bound == max(time.compute, time.memory, time.network) > 0
    assert plan.tokens_per_second == pytest.approx(8 * 256 / time.bound)
    assert 0 < plan.mfu < 1
    assert plan.as_json()["time"][plan.bottleneck] == time.bound


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        (GOLDEN / f"{case}.json").write_text(json.dumps(golden_of(case), indent=1) + "\n")
    memory = {case: plan_of(case).memory.temporaries for case in WITH_MEMORY}
    (GOLDEN / "memory.json").write_text(json.dumps(memory, indent=1) + "\n")
