"""Plans for GPUs by XLA's CUDA compiler, which needs no GPU; `scripts/test_gpu_plan.sh` runs them.

They are skipped where JAX's CUDA plugin, 5.5 GB with what it needs, is not installed.
"""

from __future__ import annotations

import importlib.util

import pytest

from lm.config import default, set_value
from lm.tools.planning.plan import make_plan
from lm.tools.planning.topologies import topology

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda12_plugin"), reason="needs JAX's CUDA plugin"
)


def plan_on(name: str, **overrides):
    config = default()
    values = {
        "model.n_layers": 2,
        "model.d_model": 256,
        "model.n_heads": 4,
        "model.vocab_size": 1024,
        "data.sequence_length": 256,
        "data.batch_size": 16,
        "parallel.preset": "fsdp",
    }
    for path, value in {**values, **overrides}.items():
        set_value(config, path.replace("__", "."), value)
    return make_plan(config, topology(name))


def test_host_of_eight_h100():
    plan = plan_on("h100:1x8")
    assert plan.fits
    assert {c.axis for c in plan.collectives} == {"fsdp"}
    assert {c.network for c in plan.collectives} == {"ici"}
    kinds = {c.kind for c in plan.collectives}
    assert "all-gather" in kinds
    assert kinds & {"reduce-scatter", "all-reduce"}
    assert plan.time is not None
    assert 0.9 < plan.compiled_flops / plan.model_flops < 1.2


def test_two_hosts_are_joined_by_the_slow_network():
    plan = plan_on("h100:2x4")
    assert {c.network for c in plan.collectives} == {"dcn"}


@pytest.mark.parametrize("kind", ["a100", "h200", "b200"])
def test_other_gpus_compile(kind):
    assert plan_on(f"{kind}:1x2", model__n_layers=1).fits


LONG = {"data__sequence_length": 2048, "data__batch_size": 2, "model__n_layers": 1}
ONE_TEXT = {"data__isolate_documents": False}
GEMMA = {"model__window": 1024, "model__attention_softcap": 50.0}


def test_packed_documents_cost_what_one_text_a_row_does():
    packed, one = (plan_on("h100:1x2", **LONG, **values) for values in ({}, ONE_TEXT))
    assert (packed.attention_kernel, one.attention_kernel) == ("tokamax", "cudnn")
    assert not [name for _, name in packed.largest if name.count("2048") > 1]
    assert packed.memory.needed <= 1.05 * one.memory.needed
    extra = 2 * 4 * 2048 * 2048 // 2 * 64 * 2  # two of nine products more, 4 heads of 64 numbers
    assert packed.compiled_flops - one.compiled_flops == extra


@pytest.mark.parametrize(
    ("name", "values", "kernel"),
    [
        ("h100:1x2", ONE_TEXT | {"model__window": 512}, "cudnn"),
        ("h100:1x2", ONE_TEXT | {"model__head_dim": 256}, "cudnn"),
        ("h100:1x2", GEMMA | {"model__head_dim": 256, "model__global_every": 2}, "tokamax"),
        ("a100:1x2", {"model__window": 512}, "triton"),
        ("b200:1x2", GEMMA | {"model__head_dim": 256}, "triton"),
    ],
)
def test_windows_softcaps_and_wide_heads_are_fused(name, values, kernel):
    plan = plan_on(name, **(LONG | {"model__n_layers": 2} | values))
    assert plan.attention_kernel == kernel
    assert not [name for _, name in plan.largest if name.count("2048") > 1]


def test_rows_are_multiplied_by_their_own_experts_alone():
    plan = plan_on("h100:1x2", model__n_experts=8, model__expert_capacity=0.0)
    assert plan.compiled_flops < 1.5 * plan.model_flops
