"""Ring attention equals attention on one device; the causal work is balanced."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from lm.kernels import cudnn_tiles, splash_attention
from lm.kernels.blockwise_attention import BlockwiseTiles
from lm.kernels.dot_product_attention import AttentionMask, attention
from lm.kernels.ring_attention import (
    NOWHERE,
    from_zigzag,
    keys_before,
    ring_attention,
    to_zigzag,
    zigzag_order,
)
from lm.kernels.splash_attention import SplashTiles

LENGTH = 32


def on_ring(function, n_devices, n_arguments):
    """`function` of [B, L, …] arrays whose length is cut over `n_devices`."""
    mesh = jax.make_mesh((n_devices,), ("ring",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec(None, "ring"),) * n_arguments
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)


def make_inputs(length, head_dim, seed):
    """Queries and the gradient of the output, keys, values, and documents of uneven lengths."""
    rng = np.random.default_rng(seed)
    q, g = jnp.asarray(rng.normal(size=(2, 2, length, 4, head_dim)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, 2, length, 2, head_dim)), jnp.float32)
    segments = np.cumsum(rng.random((2, length)) < 3.2 / length, axis=1)
    prefix = rng.random((2, length)) < 0.3
    return (0.3 * q, k, v), g, jnp.asarray(segments, jnp.int32), jnp.asarray(prefix)


def results(function, inputs, g):
    """Output and gradients."""
    out, back = jax.vjp(function, *inputs)
    return out, back(g)


def equal(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected)


# Devices, mask, soft-cap.
CASES = [
    (8, {"causal": True, "segments": True}, 0.0),
    (2, {"causal": True}, 0.7),
    (4, {"causal": False, "segments": True}, 0.7),
    (4, {"causal": True, "segments": True, "prefix": True}, 0.0),
    (2, {"causal": True, "prefix": True}, 0.0),
]


def check_ring(n_devices, mask, softcap, tiles, length, head_dim):
    inputs, g, segments, prefix = make_inputs(length, head_dim, n_devices)
    causal = mask["causal"]
    segments = segments if "segments" in mask else None
    prefix = prefix if "prefix" in mask else None

    def plain(q, k, v):
        described = AttentionMask(causal, segments, prefix_BS=prefix)
        return attention(q, k, v, described, scale=1.0, softcap=softcap)

    def ring(q, k, v):
        run = partial(ring_attention, causal=causal, axis="ring", tiles=tiles)
        return on_ring(run, n_devices, 5)(q, k, v, segments, prefix)

    run = jax.jit(results, static_argnums=0)
    equal(run(ring, inputs, g), run(plain, inputs, g))


@pytest.mark.parametrize(("n_devices", "mask", "softcap"), CASES)
def test_ring_attention_has_the_output_and_gradients_of_xla(n_devices, mask, softcap):
    check_ring(n_devices, mask, softcap, BlockwiseTiles(softcap), LENGTH, 8)


@pytest.mark.parametrize(("n_devices", "mask", "softcap"), CASES[1:])
def test_ring_of_the_tpu_kernel_has_them_too(n_devices, mask, softcap, monkeypatch):
    monkeypatch.setattr(splash_attention, "LONGEST_KEYS", 128)
    tiles = SplashTiles(softcap, interpret=True)
    check_ring(n_devices, mask, softcap, tiles, 256 * n_devices, 16)


def cudnn_reference(q, k, v, log_z=None, g=None, causal=False, lengths=None, mask_BLS=None):
    """Return output and log Z, anything beyond the number of queries; or the gradients."""
    L, S = q.shape[2], k.shape[2]
    mask = jnp.ones((1, L, S), bool) if mask_BLS is None else mask_BLS
    mask = mask & jnp.tri(L, dtype=bool) if causal else mask
    here = jnp.ones((1, L), bool)
    if lengths is not None:
        here = jnp.arange(L) < lengths[0][:, None]
        mask = mask & here[:, :, None] & (jnp.arange(S) < lengths[1][:, None])[:, None]
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = jnp.where(mask[:, None], jnp.einsum("bhlk,bhsk->bhls", q, k), -jnp.inf)
    if g is None:
        log_z = jnp.where(here[:, None], jax.nn.logsumexp(scores, -1), 7.0)
        out = jnp.einsum("bhls,bhsk->bhlk", jnp.exp(scores - log_z[..., None]), v)
        return jnp.where(here[:, None, :, None], out, 1e3), log_z
    weights = jnp.exp(scores - log_z[..., None])
    return weights, jnp.einsum("bhlk,bhsk->bhls", g, v)


def cudnn_gradients(q, k, v, log_z, delta, out, g, **mask):
    delta = (out * g).sum(-1)
    weights, of_weights = cudnn_reference(q, k, v, log_z, g, **mask)
    of_scores = weights * (of_weights - delta[..., None])
    dk = jnp.einsum("bhls,bhlk->bhsk", of_scores, q)
    dv = jnp.einsum("bhls,bhlk->bhsk", weights, g)
    dk, dv = (x.reshape(*k.shape[:2], -1, *k.shape[2:]).sum(2) for x in (dk, dv))
    repeated = jnp.repeat(k, q.shape[1] // k.shape[1], 1)
    return jnp.einsum("bhls,bhsk->bhlk", of_scores, repeated), dk, dv


@pytest.mark.parametrize(("n_devices", "mask", "softcap"), [CASES[0], (2, {"causal": True}, 0.0)])
def test_ring_of_cudnn_calls_it_for_all_pairs_and_no_others(n_devices, mask, softcap, monkeypatch):
    """With a stand-in for the kernel, which needs a GPU."""
    monkeypatch.setattr(cudnn_tiles, "LONGEST_SQUARE", 2)
    monkeypatch.setattr(cudnn_tiles, "_attend", cudnn_reference)
    monkeypatch.setattr(cudnn_tiles, "_gradients", cudnn_gradients)
    check_ring(n_devices, mask, softcap, cudnn_tiles.CudnnTiles(), 2 * LENGTH, 8)


@pytest.mark.parametrize(("n_devices", "n"), [(2, 3), (4, 8), (8, 13), (8, 28)])
def test_window_gets_the_keys_before_a_device_and_none_before_the_first(n_devices, n):
    tokens = jnp.arange(LENGTH)[None]
    mesh = jax.make_mesh((n_devices,), ("ring",), axis_types=(AxisType.Auto,))
    before = jax.shard_map(
        lambda x: jnp.stack(keys_before(x, 2 * x, 3 * x, n, "ring")),
        mesh=mesh,
        in_specs=PartitionSpec(None, "ring"),
        out_specs=PartitionSpec(None, None, "ring"),
        check_vma=False,
    )
    k, v, ids = jax.jit(before)(tokens).reshape(3, n_devices, -1)
    size = LENGTH // n_devices
    for device in range(n_devices):
        expected = np.arange(device * size - n, device * size + size)
        real = expected >= 0
        assert (k[device][real] == expected[real]).all()
        assert (v[device] == 2 * k[device]).all()
        assert (ids[device] == np.where(real, 3 * expected, NOWHERE)).all()


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
