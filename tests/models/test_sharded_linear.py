"""Products of linear maps for accelerators: the parts that can be tested without one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.dense import matmul_backward
from lm.models.sharded_linear import Map, _in_parts, _n_parts


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cuts_x", [False, True])
@pytest.mark.parametrize("leading", [(12,), (2, 6)])
def test_gradient_computed_in_parts_equals_the_whole(transposed, cuts_x, leading):
    keys = jax.random.split(jax.random.key(0), 2)
    x, g = (
        jax.random.normal(key, (*leading, width), jnp.bfloat16)
        for key, width in zip(keys, (8, 12), strict=True)
    )
    kernel = jnp.zeros((12, 8) if transposed else (8, 12), jnp.bfloat16)
    how = Map(*3 * (jnp.bfloat16,), transposed, "batch", False, False, 4, cuts_x)
    whole = matmul_backward(jnp.bfloat16, transposed, (x, kernel, x[:0]), g)[1]
    np.testing.assert_allclose(_in_parts(x, g, how), whole, rtol=1e-6, atol=1e-6)


def test_parts_are_of_whole_lanes_and_few():
    assert _n_parts(4096, 4 * 4096 * 4096) == 1  # 67 MB
    assert _n_parts(11008, 4 * 4096 * 11008) == 2  # Llama-2-7B's feed-forward layer, 180 MB
    assert _n_parts(128256, 4 * 4096 * 128256) == 6  # Llama 3's vocabulary, 2.1 GB
    assert _n_parts(50257, 4 * 4096 * 50257) == 1
