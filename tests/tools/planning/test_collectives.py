"""Collectives of compiled programs: kinds, mesh axes, bytes, counts."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lm.tools.planning.collectives import collectives, replica_groups
from lm.tools.planning.hlo import parse_hlo


@pytest.mark.parametrize(
    ("notation", "expected"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ],
)
def test_replica_groups_in_every_notation(notation, expected):
    attributes = f", channel_id=1, replica_groups={notation}, use_global_device_ids=true"
    assert replica_groups(attributes, 4).tolist() == expected


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))


COMMUNICATIONS = {
    "all-reduce": (lambda x, axis: jax.lax.psum(x, axis), 512),
    "all-gather": (lambda x, axis: jax.lax.all_gather(x, axis, tiled=True), 4 * 512),
    "reduce-scatter": (lambda x, axis: jax.lax.psum_scatter(x, axis, tiled=True), 512),
    "all-to-all": (lambda x, axis: jax.lax.all_to_all(x, axis, 0, 0, tiled=True), 512),
    "collective-permute": (
        lambda x, axis: jax.lax.ppermute(x, axis, [(i, (i + 1) % 4) for i in range(4)]),
        512,
    ),
}


@pytest.mark.parametrize("kind", COMMUNICATIONS)
def test_kind_axis_bytes_and_count_in_a_loop(kind, mesh):
    """Each device has [16, 8] float32, 512 bytes; of a gather the result counts."""
    communicate, size = COMMUNICATIONS[kind]

    @partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    def three_times(x):
        # What goes round is a sum, so that the loop's shapes stay and nothing is left out.
        return jax.lax.fori_loop(0, 3, lambda i, x: x + communicate(x * x, "tensor").sum(), x)

    shape = jax.ShapeDtypeStruct((32, 8), jnp.float32)
    module = parse_hlo(jax.jit(three_times).lower(shape).compile().as_text())
    (found,) = collectives(module, mesh)
    assert (found.kind, found.route.axis, found.count) == (kind, "tensor", 3)
    assert found.bytes == 3 * size
    share = {"all-reduce": 1.5, "collective-permute": 1.0}.get(kind, 0.75)
    assert found.sent == 3 * size * share


def test_axes_are_named_together_when_a_group_spans_both(mesh):
    both = ("data", "tensor")
    summed = jax.shard_map(
        lambda x: jax.lax.psum(x, both), mesh=mesh, in_specs=P(both), out_specs=P()
    )
    text = jax.jit(summed).lower(jax.ShapeDtypeStruct((32, 8), jnp.float32)).compile().as_text()
    (found,) = collectives(parse_hlo(text), mesh)
    assert found.route.axis == "data,tensor"
    assert len(found.route.devices) == 8
