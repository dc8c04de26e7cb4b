"""Searching the best mesh: what is tried, what is discarded before compiling, what is written."""

from __future__ import annotations

from math import prod

import jax

from lm.config import load
from lm.experiment import build
from lm.planning import search as searching
from lm.planning.search import candidates, command_line, meshes, overridden, search
from lm.planning.topologies import topology


def test_meshes_are_all_ways_to_write_the_devices_as_a_product():
    found = [tuple(sizes.values()) for sizes in meshes(8)]
    assert len(set(found)) == len(found) == 10
    assert all(prod(sizes) == 8 for sizes in found)


def test_candidates_suit_the_model_and_need_at_least_their_state(tiny_config):
    """Four heads: no mesh shards them over eight."""
    config = tiny_config()
    found = list(candidates(config, topology("cpu:8"), 1))
    assert {c.overrides["parallel.mesh.tensor"] for c in found} == {1, 2, 4}
    for candidate in found[:: len(found) // 4]:
        experiment = build(overridden(config, candidate.overrides), jax.devices())
        state = jax.tree.leaves(experiment.init_state())
        first = sum(leaf.addressable_shards[0].data.nbytes for leaf in state)
        assert candidate.least_memory > first


def test_kept_activations_are_those_of_the_paper(tiny_config):
    """Korthikanti et al. 2022, §5: with full recomputation a layer keeps its input, 2sbh bytes in
    16 bits; ours is 32 bits here, and a device has one row of 32 tokens 32 wide."""
    experiment = build(tiny_config(), jax.devices())
    full = searching.kept_activations(experiment, "full", rows=1, tensor=1)
    assert full == 2 * (32 * 32 * 4)
    assert searching.kept_activations(experiment, "dots", 1, 1) > full


def test_a_search_ranks_what_fits_and_its_winner_is_a_configuration(
    tiny_config, monkeypatch, tmp_path
):
    """Compiling happens here, not in processes, to keep the test short."""

    class Here:
        def __init__(self, *args): ...
        def __enter__(self):
            return self

        def __exit__(self, *args): ...
        def submit(self, function, *args):
            future = searching.Future()
            future.set_result(function(*args))
            return future

    monkeypatch.setattr(searching, "ProcessPoolExecutor", Here)
    found = search(tiny_config(), "cpu:8", 1, 2, 1, lambda items, total: items)
    assert len(found.ranked) == 2
    assert found.considered == found.not_compiled + 2
    memory = [plan.memory.total for _, plan in found.ranked]
    assert memory == sorted(memory)

    winner, _ = found.ranked[0]
    words = command_line(winner).split()
    overrides = dict(word.removeprefix("--config.").split("=") for word in words)
    experiment = tmp_path / "e.py"
    experiment.write_text(
        "from lm.config import default\n"
        "def get_config():\n    c = default()\n    c.data.batch_size = 8\n    return c\n"
    )
    config = load(str(experiment), overrides)
    assert config.parallel.mesh.data == winner["parallel.mesh.data"]
    assert config.train.remat == winner["train.remat"]


def test_what_cannot_fit_is_not_compiled(tiny_config, monkeypatch):
    small = topology("cpu:8")
    chip = searching.topology("cpu:8").chip
    tiny = type(chip)(memory=1000)
    monkeypatch.setattr(
        searching,
        "topology",
        lambda *_: type(small)(small.name, tiny, small.sides, small.devices),
    )
    monkeypatch.setattr(searching, "ProcessPoolExecutor", None)
    found = search(tiny_config(), "cpu:8", 1, 2, 1, lambda items, total: items)
    assert found.too_large == found.considered > 0
    assert not found.ranked
