"""Keys that go round a ring give what they give on one device; the causal work is balanced."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from lm.kernels.dot_product_attention import AttentionMask, attention
from lm.kernels.ring_attention import from_zigzag, ring_attention, to_zigzag, zigzag_order

LENGTH = 32


def on_ring(function, n_devices, n_arguments):
    """`function` of [B, L, …] arrays whose length is cut over `n_devices`."""
    mesh = jax.make_mesh((n_devices,), ("ring",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec(None, "ring"),) * n_arguments
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)


@pytest.mark.parametrize(
    ("n_devices", "causal", "segmented"), [(8, True, True), (2, True, False), (4, False, True)]
)
def test_ring_attention_has_the_output_and_gradients_of_xla(n_devices, causal, segmented):
    rng = np.random.default_rng(n_devices)
    q, g = jnp.asarray(rng.normal(size=(2, 2, LENGTH, 4, 8)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, 2, LENGTH, 2, 8)), jnp.float32)
    segments = jnp.asarray(np.cumsum(rng.random((2, LENGTH)) < 0.1, axis=1))
    segments = segments if segmented else None

    def plain(q, k, v):
        return attention(q, k, v, AttentionMask(causal, segments), scale=1.0)

    def ring(q, k, v):
        run = partial(ring_attention, causal=causal, axis="ring")
        return on_ring(run, n_devices, 4)(q, k, v, segments)

    @jax.jit
    def results(q, k, v):
        return [(out, back(g)) for out, back in (jax.vjp(f, q, k, v) for f in (ring, plain))]

    found, expected = results(q, k, v)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected)


@pytest.mark.parametrize("n_devices", [2, 4, 8])
def test_zigzag_gives_every_device_the_same_number_of_visible_keys(n_devices):
    order = zigzag_order(LENGTH, n_devices)
    assert sorted(order) == list(range(LENGTH))
    visible = (order + 1).reshape(n_devices, -1).sum(1)
    assert len(set(visible)) == 1


@pytest.mark.parametrize("n_devices", [2, 8])
def test_tokens_travel_to_their_zigzag_places_and_back(n_devices):
    tokens = jnp.arange(LENGTH)[None]
    there = on_ring(partial(to_zigzag, axis="ring"), n_devices, 1)(tokens)
    assert there[0].tolist() == zigzag_order(LENGTH, n_devices).tolist()
    back = on_ring(partial(from_zigzag, axis="ring"), n_devices, 1)(there)
    assert back[0].tolist() == list(range(LENGTH))
