"""Look-ups in a sharded table: values, gradients, and the gradient's sum."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.parallel.mesh import axis_sizes, make_mesh, parameter_sharding, use_mesh
from lm.parallel.sharded_lookup import embedding_lookup

MESHES = {
    "fsdp=8": {"fsdp": 8},
    "fsdp=2,context=2,tensor=2": {"fsdp": 2, "context": 2, "tensor": 2},
}


def gradient(table_VD, ids_BL, weights_BLD):
    def loss(table_VD):
        return (embedding_lookup(table_VD, ("vocab", "embed"), ids_BL) * weights_BLD).sum()

    return jax.value_and_grad(loss)(table_VD)


@pytest.mark.parametrize("rows", [64, 67])
@pytest.mark.parametrize("mesh", MESHES)
def test_values_and_gradient_match_one_device(mesh, rows):
    """67 rows are not divided by "tensor", and every device has them all."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(rows, 16)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, rows, (8, 4)))
    weights = jnp.asarray(rng.normal(size=(8, 4, 16)), jnp.float32)
    expected = jax.jit(gradient)(table, ids, weights)

    on_mesh = make_mesh(axis_sizes("custom", {"data": 1, **MESHES[mesh]}, 8), jax.devices())
    lies = parameter_sharding(on_mesh, ("vocab", "embed"), table.shape)

    def placed(*args):
        with use_mesh(on_mesh):
            return gradient(*args)

    step = jax.jit(placed, out_shardings=(None, lies)).lower(
        jax.device_put(table, lies), ids, weights
    )
    compiled = step.compile()
    found = compiled(jax.device_put(table, lies), ids, weights)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, expected)

    summed = re.findall(r"= f32\[([\d,]*)\]\S* all-reduce", compiled.as_text())
    whole = {f"{rows},16", f"16,{rows}"}
    assert "reduce-scatter" in compiled.as_text()
    assert not whole & set(summed)
