"""The best mesh, rematerialisation and number of microbatches for a topology.

Candidates that cannot fit by arithmetic are never compiled: their state, gradients and kept
activations alone are more than a device has. The rest are ranked by what they should cost, the
first of them compiled in processes of their own, and ranked again by their bound on the time of a
step. What turns out too large sends those behind that likely need as much.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from math import inf, prod
from multiprocessing import get_context
from typing import Any

import jax
from ml_collections import ConfigDict

from lm.config import default, flatten, set_value
from lm.config.experiment_file import import_plugins, registered_plugins
from lm.config.rules import TRANSFORMERS
from lm.errors import UserError
from lm.experiment import Experiment, build, resolve_parallelism
from lm.parallel.mesh import AXES
from lm.tools.planning.cost_model import CostModel, Estimate, Settings
from lm.tools.planning.plan import Plan, make_plan
from lm.tools.planning.topologies import Topology, topology

REMAT = ("none", "dots", "offload_dots", "full", "offload")
MICROBATCHES = (1, 2, 4, 8)
# Of a pipeline, times its stages: more leave less of it idle, and make smaller products.
IN_PIPELINE = (1, 4)

Overrides = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """Overrides of a configuration, and what arithmetic says of them."""

    overrides: Overrides
    estimate: Estimate

    @property
    def remat(self) -> str:
        return self.overrides["train.remat"]


@dataclass(frozen=True)
class Search:
    """What was found: plans that fit, fastest first, and how many candidates fell out where."""

    ranked: tuple[tuple[Overrides, Plan], ...]
    considered: int
    too_large: int
    not_compiled: int
    failed: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "considered": self.considered,
            "too_large": self.too_large,
            "not_compiled": self.not_compiled,
            "failed": list(self.failed),
            "ranked": [{"overrides": o, **plan.as_json()} for o, plan in self.ranked],
            "overrides": self.ranked[0][0] if self.ranked else None,
        }


def search(
    config: ConfigDict,
    name: str,
    n_slices: int,
    limit: int,
    workers: int,
    track: Callable[..., Any],
) -> Search:
    """Plan the `limit` most promising candidates on the topology `name`; `track` shows progress."""
    place = topology(name, n_slices)
    considered = list(candidates(config, place, n_slices))
    if not considered:
        raise UserError(f"no mesh of {len(place.devices)} devices suits this configuration")
    capacity = place.chip.memory or 0
    possible = [c for c in considered if c.estimate.least <= capacity]
    possible.sort(key=lambda c: (c.estimate.likely > capacity, c.estimate.seconds))
    compiled = list(_compile(config, name, n_slices, Queue(possible), limit, workers, track))
    plans = [(c.overrides, plan) for c, plan in compiled if isinstance(plan, Plan)]
    fitting = [(overrides, plan) for overrides, plan in plans if plan.fits]
    fitting.sort(key=_order)
    return Search(
        ranked=tuple(fitting),
        considered=len(considered),
        too_large=len(considered) - len(possible) + len(plans) - len(fitting),
        not_compiled=len(possible) - len(compiled),
        failed=tuple(
            f"{command_line(c.overrides)}: {reason}"
            for c, reason in compiled
            if isinstance(reason, str)
        ),
    )


class Queue:
    """Candidates in their order, but behind all others those that likely need as much memory as one
    of the same rematerialisation that was compiled and did not fit."""

    def __init__(self, candidates: Iterable[Candidate]):
        self.waiting = list(candidates)
        self._too_large: dict[str, float] = {}

    def take(self) -> Candidate:
        """The next one, which waits no longer."""
        chosen = min(
            self.waiting,
            key=lambda c: c.estimate.likely >= self._too_large.get(c.remat, inf),
        )
        self.waiting.remove(chosen)
        return chosen

    def did_not_fit(self, candidate: Candidate) -> None:
        known = self._too_large.get(candidate.remat, inf)
        self._too_large[candidate.remat] = min(known, candidate.estimate.likely)


def _order(found: tuple[Overrides, Plan]) -> tuple[float, float]:
    """By time; where that is not known, by memory."""
    _, plan = found
    return (plan.time.bound if plan.time else 0.0, plan.memory.total)


def candidates(config: ConfigDict, place: Topology, n_slices: int) -> Iterator[Candidate]:
    """Every mesh that suits the model, with every remat, number of microbatches, and, beside tensor
    parallelism, whole or cut sequences between the sublayers."""
    alone = {f"parallel.mesh.{axis}": 1 for axis in AXES}
    simplest = {"parallel.preset": "custom", "train.microbatches": 1, "parallel.sequence": False}
    experiment = build(overridden(config, simplest | alone), place.devices[:1])
    arithmetic, trial = CostModel(experiment, place.chip), experiment.config
    platform = place.devices[0].platform
    remats = [r for r in REMAT if platform != "cpu" or "offload" not in r]
    for found in meshes(experiment, len(place.devices) // n_slices):
        sizes = {"slice": n_slices, **found}
        on_mesh = {f"parallel.mesh.{axis}": sizes[axis] for axis in AXES}
        choices = itertools.product(
            MICROBATCHES, (False, True)[: sizes["tensor"]], IN_PIPELINE[: sizes["stage"]]
        )
        for microbatches, sequence, waiting in choices:
            overrides = {
                "parallel.preset": "custom",
                **on_mesh,
                "parallel.sequence": sequence,
                "parallel.pipeline.microbatches": waiting * sizes["stage"] * (sizes["stage"] > 1),
                "train.microbatches": microbatches,
            }
            for path, value in overrides.items():
                set_value(trial, path, value)
            try:
                schedule, _ = resolve_parallelism(trial, platform, sizes)
                for remat in remats:
                    settings = Settings(remat, microbatches, sequence)
                    estimate = arithmetic.estimate(sizes, schedule, settings)
                    yield Candidate({**overrides, "train.remat": remat}, estimate)
            except UserError:
                continue


def meshes(experiment: Experiment, n_devices: int) -> Iterator[dict[str, int]]:
    """Ways to write the devices of a slice as a product of the axes that the model has a use for:
    stages divide its layers, contexts its sequences, experts its experts."""
    model, data = experiment.config.model, experiment.config.data
    attends = model.family in TRANSFORMERS
    dividing = {
        "stage": model.n_layers if attends else 1,
        "fsdp": model.d_model,
        "expert": model.n_experts or 1,
        "context": data.sequence_length // 2 if attends else 1,
        "tensor": model.n_heads,
    }
    choices = [[d for d in _divisors(n_devices) if whole % d == 0] for whole in dividing.values()]
    for chosen in itertools.product(*choices):
        sizes = dict(zip(dividing, chosen, strict=True))
        taken = prod(chosen)
        if n_devices % taken == 0:
            yield {**sizes, "data": n_devices // taken}


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def overridden(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """A copy of a configuration with some values set by their paths."""
    config = config.copy_and_resolve_references()
    for path, value in overrides.items():
        set_value(config, path, value)
    return config


def command_line(overrides: Mapping[str, Any]) -> str:
    """The overrides as `lm train` takes them."""
    return " ".join(f"--config.{path}={value}" for path, value in overrides.items())


def _compile(
    config: ConfigDict,
    name: str,
    n_slices: int,
    queue: Queue,
    limit: int,
    workers: int,
    track: Callable[..., Any],
) -> Iterator[tuple[Candidate, Plan | str]]:
    """At most `limit` candidates, as many at a time as there are workers, each with its plan or one
    line that says why it could not be compiled."""
    limit = min(limit, len(queue.waiting))
    if not limit:
        return
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":  # JAX's own choice
        # The processes inherit it: that a candidate does not fit is no warning here.
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    given = dict(flatten(config))
    plugins = registered_plugins(), config.to_dict()
    with ProcessPoolExecutor(workers, get_context("spawn"), import_plugins, plugins) as pool:
        running: deque[tuple[Candidate, Future[Plan]]] = deque()
        for i in track(range(limit), total=limit):
            for _ in range(min(workers - len(running), limit - i - len(running))):
                candidate = queue.take()
                values = {**given, **candidate.overrides}
                running.append((candidate, pool.submit(_plan, values, name, n_slices)))
            candidate, future = running.popleft()
            try:
                plan = future.result()
                if not plan.fits:
                    queue.did_not_fit(candidate)
                yield candidate, plan
            except (UserError, RuntimeError, NotImplementedError) as error:
                yield candidate, " ".join(str(error).split())[:200]


def _plan(values: Mapping[str, Any], name: str, n_slices: int) -> Plan:
    """Run in a process of its own."""
    jax.config.update("jax_platforms", "cpu")
    return make_plan(overridden(default(), values), topology(name, n_slices), n_slices)
