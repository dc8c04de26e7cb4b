"""Search of the best mesh: candidates, those discarded before compiling, and the result."""

from __future__ import annotations

from math import prod
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from lm.config import load_config
from lm.experiment import build
from lm.hardware import CHIPS
from lm.parallel.mesh import AXES
from lm.tools.planning import mesh_search as searching
from lm.tools.planning.cost_model import CostModel, Estimate, Settings
from lm.tools.planning.mesh_search import (
    Candidate,
    CandidateQueue,
    candidates,
    command_line,
    meshes,
    microbatches_of,
    overridden,
    search_meshes,
)
from lm.tools.planning.plan import state_memory
from lm.tools.planning.topologies import topology

EXPERIMENTS = Path(__file__).parents[3] / "experiments"


def test_meshes_are_all_products_of_the_axes_that_suit_the_model(tiny_config):
    """Two layers, four heads, 32 tokens of width 32: 2^s × 2^f × 2^c × 2^t with s ≤ 1, t ≤ 2 and
    s + f + c + t ≤ 3, the rest data parallel, are 29."""
    found = [tuple(sorted(s.items())) for s in meshes(build(tiny_config(), jax.devices()), 8)]
    assert len(set(found)) == len(found) == 29
    assert all(prod(dict(sizes).values()) == 8 for sizes in found)
    assert {axis for sizes in found for axis, n in sizes if n > 1} == {
        *("stage", "data", "fsdp", "context", "tensor")
    }


def test_experts_are_divided_in_stages_too(tiny_config):
    config = tiny_config(model__n_experts=4, model__experts_per_token=1)
    found = {(s["stage"], s["expert"]) for s in meshes(build(config, jax.devices()), 8)}
    assert found == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)}


def test_candidates_suit_the_model_and_need_at_least_their_state(tiny_config):
    """Four heads: no mesh shards them over eight."""
    found = list(candidates(tiny_config(), topology("cpu:8"), 1))
    assert {c.overrides["parallel.mesh.tensor"] for c in found} == {1, 2, 4}
    assert {c.overrides["parallel.mesh.stage"] for c in found} == {1, 2}
    assert {c.overrides["train.remat"] for c in found} == {"none", "dots", "full"}
    cut = {c.overrides["parallel.mesh.tensor"] for c in found if c.overrides["parallel.sequence"]}
    assert cut == {2, 4}
    for candidate in found[:: len(found) // 4]:
        experiment = build(overridden(tiny_config(), candidate.overrides), jax.devices())
        assert candidate.estimate.least > sum(state_memory(experiment)[:2])


def test_microbatches_are_divisors_of_the_batch(tiny_config):
    """nanoGPT's 480 rows fit on sixteen v5e chips in five microbatches, which is no power of two;
    of 1,024 rows of 4,096 tokens on eight chips 1,024 tokens are left in each of 512."""
    config = tiny_config(data__batch_size=480, data__sequence_length=1024)
    assert microbatches_of(config, 16)[:5] == [1, 2, 3, 4, 5]
    assert microbatches_of(config, 16)[-1] == 32
    config = tiny_config(data__batch_size=1024, data__sequence_length=4096)
    assert microbatches_of(config, 8) == [2**n for n in range(10)]
    tried = {c.overrides["train.microbatches"] for c in searched(tiny_config(data__batch_size=24))}
    assert tried >= {1, 2, 3, 4, 6, 8, 12, 24}


def searched(config):
    return candidates(config, topology("cpu:8"), 1)


def test_equal_bounds_are_ranked_by_hidden_time():
    """Bounds that differ by a rounding: what overlaps imperfectly decides, then memory."""
    plans = {
        "much traffic": planned(bound=0.28201, memory=0.23, total=1),
        "little": planned(bound=0.28202, memory=0.11, total=3),
        "as little, less memory": planned(bound=0.28202, memory=0.11, total=2),
        "faster": planned(bound=0.271, memory=0.27, total=9),
    }
    found = sorted(plans, key=lambda name: searching.order(plans[name]))
    assert found == ["faster", "as little, less memory", "little", "much traffic"]


def test_arithmetic_agrees_with_the_shardings(tiny_config):
    """Parameters, their moments and gradients; full recomputation keeps a layer's input, 2sbh bytes
    in 16 bits (Korthikanti et al. 2022, §5), here 32 bits."""
    for mesh in ({"fsdp": 8}, {"stage": 2, "fsdp": 2, "tensor": 2}):
        config = tiny_config(train__remat="full", data__batch_size=16)
        config.parallel.mesh.update({"data": 1, **mesh})
        experiment = build(config, jax.devices())
        sizes = experiment.mesh.shape
        found = CostModel(experiment, topology("cpu:8").chip).estimate(
            sizes, experiment.pipeline, Settings("full", 1, False)
        )
        rows = 16 // (sizes["fsdp"] * sizes["data"])
        kept = rows * 32 * 32 * 4 * 2 // sizes["stage"]
        counters = 100  # of steps, in the optimizer's state
        assert found.least == pytest.approx(sum(state_memory(experiment)[:3]) + kept, abs=counters)
        assert found.likely > found.least


def test_offloading_and_recomputing_keep_less_and_cost_more(tiny_config):
    experiment = build(tiny_config(), jax.devices()[:1])
    arithmetic, sizes = CostModel(experiment, CHIPS["v5e"]), experiment.mesh.shape
    remats = ("none", "dots", "offload_dots", "full", "offload")
    found = [
        arithmetic.estimate(sizes, experiment.pipeline, Settings(remat, 1, False))
        for remat in remats
    ]
    assert [e.compute for e in found] == sorted(e.compute for e in found)
    assert [e.likely for e in found] == sorted((e.likely for e in found), reverse=True)


def test_search_ranks_what_fits_and_its_winner_is_a_configuration(
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
    found = search_meshes(
        tiny_config(model__n_layers=1),
        "cpu:8",
        limit=2,
        n_workers=1,
        track=lambda items, total: items,
    )
    assert len(found.ranked) == 2
    assert found.considered == found.not_compiled + 2
    memory = [plan.memory.needed for _, plan in found.ranked]
    assert memory == sorted(memory)

    winner, _ = found.ranked[0]
    words = command_line(winner).split()
    overrides = dict(word.removeprefix("--config.").split("=") for word in words)
    experiment = tmp_path / "e.py"
    experiment.write_text(
        "from lm.config import default\n"
        "def get_config():\n    c = default()\n    c.data.batch_size = 8\n    return c\n"
    )
    config = load_config(str(experiment), overrides)
    assert config.parallel.mesh.data == winner["parallel.mesh.data"]
    assert config.train.remat == winner["train.remat"]
    assert config.parallel.sequence == winner["parallel.sequence"]


def test_without_a_capacity_gpus_multiply_by_all_experts_and_tpus_do_not(tiny_config):
    """XLA's own lowering does, Mixtral's FLOPs 4.8 times; TPUs have a kernel."""

    def estimate(chip, **changes):
        config = tiny_config(model__n_experts=4, model__experts_per_token=1, **changes)
        experiment = build(config, jax.devices()[:1])
        settings = Settings("none", 1, False)
        model = CostModel(experiment, CHIPS[chip])
        return model.estimate(experiment.mesh.shape, experiment.pipeline, settings)

    assert estimate("v5p") == estimate("v5p", model__expert_capacity=1.0)
    limited, all_of_them = estimate("h100", model__expert_capacity=1.0), estimate("h100")
    assert all_of_them.least == limited.least
    assert all_of_them.likely > 1.5 * limited.likely
    assert all_of_them.compute > 1.5 * limited.compute
    assert all_of_them.memory > limited.memory


def queued(name, remat="none", likely=4, compute=1.0, memory=0.0, microbatches=1):
    overrides = {f"parallel.mesh.{axis}": 1 for axis in AXES} | {
        "name": name,
        "train.remat": remat,
        "train.microbatches": microbatches,
        "parallel.sequence": False,
    }
    return Candidate(overrides, Estimate(0, likely, compute, memory))


def planned(fits=True, total=4, **times):
    time = SimpleNamespace(**{"compute": 1.0, "memory": 0.0, "network": 0.0, **times})
    return SimpleNamespace(fits=fits, time=time, memory=SimpleNamespace(needed=total))


def test_candidates_as_large_as_a_failed_one_are_demoted():
    whole = [queued("a", "none", 8), queued("b", "none", 9), queued("c", "none", 4)]
    queue = CandidateQueue([*whole, queued("d", "full", 9)])
    first = queue.take()
    queue.learn(first, planned(fits=False))
    order = [first, *(queue.take() for _ in range(3))]
    assert [c.overrides["name"] for c in order] == ["a", "c", "d", "b"]
    assert not queue.waiting


def test_compiled_candidates_correct_similar_estimates():
    """Without remat memory traffic takes five times as long as the model says: the others of the
    kind fall behind full remat, whose own estimate hardly changes."""
    others = [queued(f"none {n}", "none", memory=1.1, microbatches=n) for n in (1, 2, 4)]
    queue = CandidateQueue([*others, queued("full", "full", compute=1.3, memory=1.2)])
    first = queue.take()
    assert first.remat == "none"
    queue.learn(first, planned(memory=5.5))
    assert [queue.take().remat for _ in range(3)] == ["full", "none", "none"]


def test_candidates_likely_too_large_come_last_until_a_plan_corrects_them():
    fast, slow = queued("fast", likely=10, compute=1.0), queued("slow", likely=4, compute=2.0)
    assert CandidateQueue([fast, slow], capacity=8).take() is slow
    queue = CandidateQueue([queued("seen", likely=6, compute=0.5), fast, slow], capacity=8)
    queue.learn(queue.take(), planned(total=3, compute=0.5))
    assert queue.take() is fast


def test_smallest_candidate_is_tried_first_if_few_fit():
    """By the estimates nothing fits; the fastest three need most."""
    sizes = {"none": 40, "dots": 20, "offload_dots": 16, "full": 9}
    slow = {"full": 4.0}
    waiting = [queued(r, r, likely=n, compute=slow.get(r, 1.0)) for r, n in sizes.items()]
    queue = CandidateQueue(waiting, capacity=8)
    assert [queue.take().remat for _ in waiting] == ["full", "offload_dots", "dots", "none"]


def test_small_microbatches_and_full_remat_are_found_where_traffic_decides():
    """GPT-2 on eight v5e chips, where the compiled bounds are: full remat in eight microbatches
    0.319 s (compute), dots 0.390 s and none 0.565 s (memory), tensor parallel 0.75 s (network)."""
    pytest.importorskip("libtpu")
    config = load_config(str(EXPERIMENTS / "gpt2.py:124m"))
    queue = CandidateQueue(candidates(config, topology("v5e-8"), 1), CHIPS["v5e"].memory)
    best = queue.take()
    assert (best.remat, best.overrides["train.microbatches"]) == ("full", 8)
    assert best.axes == {"data"}
    assert best.estimate.seconds == pytest.approx(0.319, rel=0.1)


def test_candidates_that_cannot_fit_are_not_compiled(tiny_config, monkeypatch):
    small = topology("cpu:8")
    chip = searching.topology("cpu:8").chip
    tiny = type(chip)(memory=1000)
    monkeypatch.setattr(
        searching,
        "topology",
        lambda *_: type(small)(small.name, tiny, small.sides, small.devices),
    )
    monkeypatch.setattr(searching, "ProcessPoolExecutor", None)
    found = search_meshes(
        tiny_config(), "cpu:8", limit=2, n_workers=1, track=lambda items, total: items
    )
    assert found.too_large == found.considered > 0
    assert not found.ranked
