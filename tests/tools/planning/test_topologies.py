"""Names of topologies, and the bandwidth between their devices."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.errors import UserError
from lm.hardware import CHIPS
from lm.tools.planning import topologies
from lm.tools.planning.topologies import interconnect, kind_and_shape, target_config, topology


@pytest.mark.parametrize(
    ("name", "slices", "message"),
    [
        ("v5p", 1, "write KIND:SHAPE or its usual name, such as v5p:4x4x4"),
        ("2xv5e-16", 1, "did you mean v5e.*v5litepod-256"),
        ("v5p:4x0x4", 1, "write KIND:SHAPE"),
        ("v9:2x2", 1, "unknown chip 'v9'.*known: v4, v5e, v5p"),
        ("h10:1x8", 1, "did you mean h100"),
        ("cpu:2x2", 1, "simulated as cpu:8"),
        ("cpu:2", 2, "without --slices"),
        ("cpu:64", 1, "this process has 8 CPU devices already"),
        ("cpu:99999999", 1, "at most 4096 CPU devices are simulated"),
    ],
)
def test_unknown_topology_is_an_error_with_known_names(name, slices, message):
    jax.devices()  # from now on the number of CPU devices is fixed
    with pytest.raises(UserError, match=message):
        topology(name, slices)


@pytest.mark.parametrize(("name", "extra"), [("v5p:2x2x2", "tpu"), ("h100:1x8", "cuda12")])
def test_missing_compiler_is_a_one_line_error_that_names_the_extra(name, extra, monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install .*\[{extra}\]'"):
        topology(name)


@dataclass(frozen=True)
class Device:
    platform: str
    coords: tuple[int, ...] = ()
    slice_index: int = 0
    process_index: int = 0


def torus(*coords):
    return [Device("tpu", c) for c in coords]


@pytest.mark.parametrize(
    ("kind", "sides", "group", "links"),
    [
        # A line of v5e chips, a ring of sixteen, a plane.
        ("v5e", (4, 4), [(i, 0, 0) for i in range(4)], 1),
        ("v5e", (16, 16), [(i, 0, 0) for i in range(16)], 2),
        ("v5e", (4, 4), [(i, j, 0) for i in range(4) for j in range(4)], 2),
        # v5p sides of four are rings; of two they are one link.
        ("v5p", (4, 4, 4), [(0, i, 0) for i in range(4)], 2),
        ("v5p", (4, 4, 4), [(i, j, k) for i in range(4) for j in range(4) for k in range(4)], 6),
        ("v5p", (2, 2, 2), [(i, 0, 0) for i in range(2)], 1),
    ],
)
def test_group_sends_along_every_dimension_that_it_spans(kind, sides, group, links):
    found = interconnect(CHIPS[kind], torus(*group), sides)
    assert (found.network, found.bandwidth) == ("ici", links * CHIPS[kind].link)


def test_slices_and_hosts_are_joined_by_the_slow_network():
    chips = [Device("tpu", (i, 0, 0), s) for s in range(2) for i in range(4)]
    found = interconnect(CHIPS["v5e"], chips, (4, 4))
    # Each of the four chips of a slice carries a quarter of what crosses.
    assert (found.network, found.bandwidth, found.spread) == ("dcn", 3.125e9, 4)
    gpus = [Device("gpu", process_index=i // 8) for i in range(16)]
    assert interconnect(CHIPS["h100"], gpus[:8], (2, 8)).bandwidth == 450e9
    assert interconnect(CHIPS["h100"], gpus, (2, 8)).bandwidth == 50e9


def test_targets_describe_the_gpus_of_the_table():
    for kind in ("a100", "h100", "h200", "b200"):
        assert f"device_memory_size: {CHIPS[kind].memory}" in target_config(kind)


def test_every_usual_name_of_devices_is_understood():
    shapes = {
        "v5e-8": "v5e:2x4", "v5litepod-16": "v5e:4x4", "v5litepod-256": "v5e:16x16",
        "v6e-1": "v6e:1x1", "v6e-4": "v6e:2x2", "v6e-128": "v6e:8x16", "v4-8": "v4:2x2x1",
        "v4-16": "v4:2x2x2", "v4-64": "v4:2x4x4", "v5p-128": "v5p:4x4x4", "V5P-384": "v5p:4x4x12",
        "v5p-4096": "v5p:8x16x16", "TPU v5e-8": "v5e:2x4", "v5lite:2x4": "v5e:2x4",
        "v5p 4x4x4": "v5p:4x4x4", "v5e:2×4": "v5e:2x4", "tpu7x:2x2x1": "7x:2x2x1",
        "h100:1x8": "h100:1x8", "h100:8": "h100:1x8", "8xh100": "h100:1x8", "h100-8": "h100:1x8",
        "8x H100": "h100:1x8", "2x8xh100": "h100:2x8", "16xa100": "a100:2x8", "b200x4": "b200:1x4",
        "nvidia-h200-8": "h200:1x8", "cpu-8": "cpu:8", "8xcpu": "cpu:8",
    }  # fmt: skip
    assert {name: kind_and_shape(name) for name in shapes} == shapes
    for name in ("v5p-7", "v5p-100", "v5e-3", "v5e-512", "v4-0", "v6e-2"):
        with pytest.raises(UserError, match="there is no such slice"):
            kind_and_shape(name)
    with pytest.raises(UserError, match="12 GPUs do not fill hosts of 8"):
        kind_and_shape("12xh100")


@given(
    st.from_regex(
        r"(tpu|nvidia)?[ -]?(v[2-9][ep]?|h100|cpu|7x)?[:x -]?[0-9x-]{0,6}", fullmatch=True
    )
)
def test_name_is_understood_or_an_error_that_shows_the_forms(name):
    try:
        found = kind_and_shape(name)
    except UserError as error:
        assert_names_the_forms(str(error))
    else:
        assert kind_and_shape(found) == found


def assert_names_the_forms(message):
    assert "write " in message
