"""Plans for TPUs by the real TPU compiler: what is communicated, where parameters lie.

`golden/NAME.json` holds the sharding of every parameter and the collectives of a configuration on
a small slice; a difference names what changed. After a change that is meant:
`python tests/planning/test_tpu.py` writes the files again.
"""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import pytest

from lm.config import default, set_value
from lm.experiment import build
from lm.optim.parameter_groups import flat
from lm.planning.plan import Plan, make_plan
from lm.planning.topologies import topology

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")

GOLDEN = Path(__file__).with_name("golden")
LLAMA = {
    "model.n_layers": 2,
    "model.d_model": 256,
    "model.n_heads": 2,
    "model.d_ff": 512,
    "model.vocab_size": 1024,
    "model.norm": "rmsnorm",
    "model.positions": "rotary",
    "model.activation": "swiglu",
    "model.bias": False,
    "model.tie_embeddings": False,
    "data.sequence_length": 256,
    "data.batch_size": 8,
}
CASES = {
    "decoder-data": ("v5e:2x2", {}),
    "decoder-fsdp": ("v5e:2x4", {"parallel.preset": "fsdp", "train.remat": "full"}),
    "decoder-fsdp-tensor": (
        "v5e:2x2",
        {"parallel.mesh.data": 1, "parallel.mesh.fsdp": 2, "parallel.mesh.tensor": 2},
    ),
}


@cache
def plan_of(case: str) -> Plan:
    return make_plan(config_of(case), topology(CASES[case][0]))


def config_of(case: str) -> Any:
    config = default()
    for path, value in {**LLAMA, **CASES[case][1]}.items():
        set_value(config, path, value)
    return config


def golden_of(case: str) -> dict[str, Any]:
    experiment = build(config_of(case), topology(CASES[case][0]).devices)
    shardings = flat(experiment.state_sharding.params)
    return {
        "parameters": {path: axes_of(shardings[path]) for path in sorted(shardings)},
        # Kind, axis, count, bytes; the few bytes of loss and norms aside.
        "collectives": [
            f"{c.kind} {c.axis} {c.count} {c.bytes}"
            for c in sorted(plan_of(case).collectives, key=lambda c: (c.kind, c.axis, c.count))
            if c.bytes > 1000
        ],
    }


def axes_of(sharding: Any) -> str:
    """The mesh axes that divide each dimension, as "- fsdp tensor"."""
    sizes = sharding.mesh.shape
    dimensions = [axes if isinstance(axes, tuple) else (axes,) for axes in sharding.spec]
    return " ".join(
        ",".join(axis for axis in axes if axis and sizes[axis] > 1) or "-" for axes in dimensions
    )


@pytest.mark.parametrize("case", CASES)
def test_golden_shardings_and_collectives(case):
    expected = json.loads((GOLDEN / f"{case}.json").read_text())
    assert golden_of(case) == expected


def parameter_bytes(case: str, per_item: int) -> int:
    return plan_of(case).parameters * per_item


def test_data_parallel_sums_gradients_and_gathers_nothing():
    plan = plan_of("decoder-data")
    assert {(c.kind, c.axis) for c in plan.collectives} == {("all-reduce", "data")}
    summed = sum(c.bytes for c in plan.collectives)
    assert summed == pytest.approx(parameter_bytes("decoder-data", 4), rel=0.15)


def test_fsdp_gathers_twice_scatters_once_and_sums_no_whole_parameter():
    """With full rematerialisation the layers are gathered forward and backward, in bfloat16."""
    plan = plan_of("decoder-fsdp")
    sizes = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce"), 0)
    for c in plan.collectives:
        assert c.axis == "fsdp"
        sizes[c.kind] += c.bytes
    layers = sum(
        leaf.size
        for path, leaf in flat(
            build(config_of("decoder-fsdp"), topology("v5e:2x4").devices).state_shapes.params
        ).items()
        if "layers" in path
    )
    assert sizes["all-gather"] >= 2 * 2 * layers
    assert sizes["reduce-scatter"] >= 2 * layers
    # Only the gradient of the token table, which a look-up scatters, is summed whole.
    table = LLAMA["model.vocab_size"] * LLAMA["model.d_model"] * 2
    assert sizes["all-reduce"] < 1.02 * table


def test_a_table_sharded_by_vocabulary_is_looked_up_without_gathering_it():
    """Over "tensor" nothing of the size of the table's half moves; "fsdp" gathers its width."""
    plan = plan_of("decoder-fsdp-tensor")
    gathered = [c for c in plan.collectives if c.kind == "all-gather" and "tensor" in c.axis]
    table = LLAMA["model.vocab_size"] * LLAMA["model.d_model"] * 2
    assert all(c.bytes / c.count < table / 2 for c in gathered)


def test_flops_are_those_of_the_model_and_what_full_remat_repeats():
    """Two thirds more forward passes than none: 4/3 of the products, less the last product of
    each block, whose result nobody needs again."""
    ratio = {
        case: plan.compiled_flops / plan.model_flops
        for case in ("decoder-data", "decoder-fsdp")
        if (plan := plan_of(case)).compiled_flops
    }
    assert 1.0 < ratio["decoder-data"] < 1.15
    assert 1.2 < ratio["decoder-fsdp"] < 1.45


def test_attention_is_splash():
    assert plan_of("decoder-fsdp").attention_kernel == "splash"


def test_the_time_is_bound_by_the_largest_term():
    plan = plan_of("decoder-fsdp")
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
