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


def test_a_host_of_eight_h100():
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


def test_attention_is_cudnns():
    assert plan_on("h100:1x2").attention_kernel == "cudnn"
