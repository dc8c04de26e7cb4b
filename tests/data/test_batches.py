import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import grain
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lm
from lm.config import default
from lm.data.batches import (
    Batches,
    addressable_rows,
    all_in_order,
    prefetch,
    shuffle_endlessly,
    to_device,
)
from lm.data.mixture import shuffle_and_mix
from lm.errors import UserError


class Numbers:
    """Examples of 17 tokens that start at `first`, `first` + `stride`, …"""

    def __init__(self, n: int, stride: int = 16, first: int = 0):
        self.starts = range(first, first + n * stride, stride)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": np.arange(17) + self.starts[index]}


def noisy(example, generator):
    return {
        "tokens": example["tokens"],
        "noise": generator.random(3, np.float32),
        "first": example["tokens"][0],
    }


@pytest.fixture
def batches():
    return Batches(shuffle_endlessly(Numbers(62), seed=1), noisy, batch_size=8, seed=5)


@pytest.fixture
def sharding():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def firsts(examples, start, stop):
    return [int(examples[i]["tokens"][0]) for i in range(start, stop)]


def test_batch_does_not_depend_on_how_hosts_divide_its_rows(batches):
    for step in (0, 7, 123_456):
        whole = batches.rows(step, range(8))
        for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [6], [5, 0, 3], np.arange(8)):
            equal(batches.rows(step, rows), {name: whole[name][rows] for name in whole})


def test_batch_is_a_function_of_seed_and_step(batches):
    again = Batches(shuffle_endlessly(Numbers(62), 1), noisy, 8, seed=5)
    equal(again.rows(3, range(8)), batches.rows(3, range(8)))
    other_order = shuffle_endlessly(Numbers(62), 2)
    assert firsts(other_order, 0, 20) != firsts(batches.examples, 0, 20)
    other_noise = Batches(batches.examples, noisy, 8, seed=6)
    assert (other_noise.rows(3, [0])["noise"] != batches.rows(3, [0])["noise"]).all()
    noise = np.concatenate([batches.rows(step, range(8))["noise"] for step in range(20)])
    assert len(np.unique(noise)) > 0.99 * noise.size


def test_epoch_holds_every_example_once_in_an_order_of_its_own(batches):
    epochs = [firsts(batches.examples, e * 62, (e + 1) * 62) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 62 * 16, 16))
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize(
    ("shares", "share"), [((4000, 1000), 0.8), ((1.0, 3.0), 0.25), ((0.7, 0.3), 0.7)]
)
def test_mixtures_keep_their_proportions(shares, share):
    parts = [Numbers(250), Numbers(60, first=10_000)]
    examples = shuffle_and_mix(parts, SimpleNamespace(weights=shares), default())
    drawn = np.asarray(firsts(examples, 0, 2000))
    assert np.mean(drawn < 10_000) == pytest.approx(share, abs=0.01)
    head = np.asarray(firsts(examples, 0, 40))
    assert np.mean(head < 10_000) == pytest.approx(share, abs=0.06)


def test_evaluation_goes_through_all_parts_in_order_and_ends_with_zeros():
    examples = all_in_order([Numbers(3), Numbers(2, first=100)])
    evaluation = Batches(examples, noisy, batch_size=4, seed=0)
    assert len(evaluation) == 2
    assert evaluation.rows(0, range(4))["first"].tolist() == [0, 16, 32, 100]
    last = evaluation.rows(1, range(4))
    assert last["first"].tolist() == [116, 0, 0, 0]
    assert not any(values[1:].any() for values in last.values())
    equal(evaluation.rows(1, [2]), {name: values[2:3] for name, values in last.items()})


def test_examples_may_come_from_any_grain_dataset():
    examples = grain.MapDataset.range(5).map(lambda i: {"tokens": np.full(2, i)})
    found = Batches(examples, lambda example, _: example, 2, 0).rows(1, range(2))
    assert found["tokens"].tolist() == [[2, 2], [3, 3]]


def test_too_many_examples_to_shuffle_are_reported():
    with pytest.raises(UserError, match=r"more than 2\*\*32: use a larger --config.data.stride"):
        shuffle_endlessly(Numbers(2**32 + 1, stride=1), 0)


def all_of(sharding):
    """The shardings of the arrays of a batch."""
    return dict.fromkeys(("tokens", "noise", "first"), sharding)


def test_steps_on_a_device_are_stacked(batches, sharding):
    assert addressable_rows(sharding, 8).tolist() == list(range(8))
    placed = to_device(batches, [3, 5], all_of(sharding))
    assert placed["tokens"].shape == (2, 8, 17)
    assert placed["first"].shape == (2, 8)
    assert placed["tokens"].sharding == sharding
    for place, step in enumerate([3, 5]):
        equal(
            {name: values[place] for name, values in placed.items()}, batches.rows(step, range(8))
        )


def test_transfers_pass_the_transfer_guard(batches, sharding):
    before = jax.config.jax_transfer_guard
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        list(prefetch(batches, [range(3)], all_of(sharding)))
    finally:
        jax.config.update("jax_transfer_guard", before)


def test_prefetched_batches_match_their_steps(batches, sharding):
    dispatches = [[5], [6, 7], range(8, 11), [2]]
    found = list(prefetch(batches, dispatches, all_of(sharding), depth=3))
    for batch, steps in zip(found, dispatches, strict=True):
        equal(batch, to_device(batches, steps, all_of(sharding)))


def batch_threads():
    return [t for t in threading.enumerate() if t.name.startswith("lm-batches")]


def test_prefetching_stays_a_fixed_number_of_steps_ahead(batches, sharding):
    made = []

    def counting(example, generator):
        made.append(1)
        return noisy(example, generator)

    counted = Batches(batches.examples, counting, 8, 0)
    stream = prefetch(counted, ([step] for step in range(100)), all_of(sharding), depth=3)
    next(stream)
    deadline = time.time() + 10
    while len(made) < 4 * 8 and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == 4 * 8
    stream.close()
    assert len(made) == 4 * 8
    assert not batch_threads()


def test_errors_of_the_thread_reach_the_consumer(batches, sharding):
    def failing(example, generator):
        raise UserError("no such feature")

    stream = prefetch(Batches(batches.examples, failing, 8, 0), [[0], [1]], all_of(sharding))
    with pytest.raises(UserError, match="no such feature"):
        next(stream)
    assert not batch_threads()


HOST = """
import sys
import jax
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
process, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)

import grain
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from lm.data.batches import Batches, addressable_rows, prefetch

built = []


def features(example, generator):
    built.append(int(example["tokens"][0]))
    return {"tokens": example["tokens"], "label": example["tokens"][0]}


examples = grain.MapDataset.range(100).map(lambda i: {"tokens": i * 10 + np.arange(4)})
batches = Batches(examples, features, 8, 0)
whole = np.arange(8, 16)[:, None] * 10 + np.arange(4)


def check(array, expected):
    assert array.shape == expected.shape
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index])


for shape, spec, n_rows in [
    ((4, 1), PartitionSpec(None, "data"), 4),
    ((2, 2), PartitionSpec(None, "data"), 4),
    ((1, 4), PartitionSpec(None, "data"), 8),
    ((2, 2), PartitionSpec(None, ("tensor", "data")), 4),
]:
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, spec)
    rows = addressable_rows(sharding, 8)
    assert len(rows) == n_rows, rows
    built.clear()
    shardings = dict.fromkeys(("tokens", "label"), sharding)
    (batch,) = prefetch(batches, [[1, 0]], shardings)
    assert sorted(built) == sorted([80 + 10 * row for row in rows] + [10 * row for row in rows])
    check(batch["tokens"], np.stack([whole, whole - 80]))
    check(batch["label"], np.stack([whole, whole - 80])[..., 0])
"""


def test_each_host_builds_only_its_own_rows():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = str(Path(lm.__file__).parents[1])
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(process), port],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    outputs = [host.communicate(timeout=100)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(outputs)
