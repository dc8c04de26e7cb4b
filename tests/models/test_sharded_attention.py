"""Kernels that run on each device's shards equal those on one device."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.dot_product_attention import AttentionMask
from lm.kernels.splash_attention import SplashTiles, make_splash_kernel
from lm.models import sharded_attention
from lm.models.attention import attend
from lm.parallel.mesh import axis_sizes, make_mesh, use_mesh

LENGTH = 512


LOCAL = {"causal": True, "window": 100}


@pytest.mark.parametrize(
    ("kernel", "across", "mesh", "visible", "softcap"),
    [
        ("splash", "gather", {"context": 2, "tensor": 2}, {"causal": False, "window": 101}, 0.0),
        ("splash", "", {"data": 2}, {"causal": True}, 0.0),
        ("splash", "ring", {"context": 2, "tensor": 2}, LOCAL | {"chunks": True}, 0.0),
        ("splash", "gather", {"context": 2, "tensor": 2}, {"causal": True}, 0.0),
        ("splash", "gather", {"context": 2, "tensor": 2}, {"causal": True, "window": 100}, 1.5),
        ("splash", "ring", {"context": 2, "tensor": 4}, {"causal": True, "window": 100}, 1.5),
        ("splash", "ring", {"context": 4}, {"causal": False}, 0.0),
        ("blockwise", "ring", {"context": 4, "tensor": 2}, {"causal": True, "window": 300}, 1.5),
        ("xla", "ring", {"context": 8}, {"causal": True, "window": 150}, 0.0),
        ("blockwise", "", {"data": 2, "tensor": 4}, {"causal": False}, 0.0),
        ("blockwise", "", {"data": 2}, {"causal": True, "window": 100}, 0.0),
    ],
)
def test_kernels_on_a_mesh_equal_xla_on_one_device(
    kernel, across, mesh, visible, softcap, monkeypatch
):
    """Kernels have sinks; splash is interpreted, in zig-zag order with two parts of the sequence.

    With a window, for a local layer and for a global one.
    """
    monkeypatch.setattr(
        sharded_attention, "make_splash_kernel", partial(make_splash_kernel, interpret=True)
    )
    monkeypatch.setattr(sharded_attention, "SplashTiles", partial(SplashTiles, interpret=True))
    rng = np.random.default_rng(0)
    # The mesh divides the four query heads, not always the two key/value heads.
    q, k, v, g = (
        jnp.asarray(rng.normal(size=(2, LENGTH, heads, 16)), jnp.float32) for heads in (4, 2, 2, 4)
    )
    sinks = jnp.asarray(rng.normal(size=4), jnp.float32)
    segments = jnp.asarray(np.cumsum(rng.random((2, LENGTH)) < 4 / LENGTH, axis=1) + 1)
    if visible.get("chunks"):
        first = [np.searchsorted(row, row) for row in np.asarray(segments)]
        in_text = np.arange(LENGTH) - np.stack(first)
        window = visible["window"]
        visible = {"causal": True, "window": window, "window_BL": jnp.asarray(in_text % window + 1)}

    def attended(q, k, v, sinks, is_global, kernel):
        visibility = AttentionMask(segments_BL=segments, **visible | {"is_global": is_global})
        options = {"scale": 0.3, "softcap": softcap, "sinks_H": sinks}
        options |= {"kernel": kernel, "context_attention": across}
        return attend(q, k, v, visibility, **options)

    def on_mesh(*qkv, is_global):
        n = int(np.prod([*mesh.values()]))
        with use_mesh(make_mesh(axis_sizes("custom", mesh, n), jax.devices()[:n])):
            return attended(*qkv, is_global, kernel)

    @jax.jit
    def results(is_global, *qkv):
        ways = (on_mesh, partial(attended, kernel="xla"))
        ways = [partial(way, is_global=is_global) for way in ways]
        return [(out, back(g)) for out, back in (jax.vjp(f, *qkv) for f in ways)]

    for is_global in (False, True) if "window" in visible else (None,):
        found, expected = results(is_global, q, k, v, sinks)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), found, expected)
