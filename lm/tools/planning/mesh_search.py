"""`lm plan --search`: best mesh, rematerialization and number of microbatches for a topology.

Candidates whose lower bound on memory (cost model) exceeds the device's are never compiled. The
others are ranked by the model; the best are compiled, each in its own process, and ranked again by
the bound on step time. Compiled candidates correct the estimates of similar ones; one that turns
out too large demotes those that likely need as much memory.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from math import inf, prod
from multiprocessing import get_context
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lm.config import default, flatten, set_value
from lm.config.registries import SCHEMA, TRANSFORMERS
from lm.config.run_file import import_plugins
from lm.errors import UserError
from lm.experiment import Experiment, build, resolve_parallelism
from lm.parallel.mesh import AXES, make_mesh
from lm.parallel.worker_processes import end_with_parent, starting_workers
from lm.tools.planning.cost_model import CostModel, Estimate, Settings
from lm.tools.planning.plan import Plan, make_plan
from lm.tools.planning.topologies import Topology, interconnect, topology

REMAT = ("none", "dots", "offload_dots", "full", "offload")
# More microbatches than this only while a device has this many tokens in each.
MICROBATCHES, TOKENS_OF_MICROBATCH = 32, 1024
# Microbatches per pipeline stage: more shrink the bubble, and the matrix products.
MICROBATCHES_PER_STAGE = (1, 4)

Overrides = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """Configuration overrides and their estimate."""

    overrides: Overrides
    estimate: Estimate

    @property
    def remat(self) -> str:
        """Rematerialization."""
        return self.overrides["train.remat"]

    @cached_property
    def axes(self) -> frozenset[str]:
        """Mesh axes larger than 1."""
        return frozenset(axis for axis in AXES if self.overrides[f"parallel.mesh.{axis}"] > 1)


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        ranked: Overrides and plans that fit, fastest first.
        considered: Number of candidates.
        too_large: Candidates that do not fit, by the cost model or compiled.
        not_compiled: Candidates beyond the limit.
        failed: Overrides and error of candidates that do not compile.
    """

    ranked: tuple[tuple[Overrides, Plan], ...]
    considered: int
    too_large: int
    not_compiled: int
    failed: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return what `lm plan --search --json` prints."""
        return {
            "considered": self.considered,
            "too_large": self.too_large,
            "not_compiled": self.not_compiled,
            "failed": list(self.failed),
            "ranked": [{"overrides": o, **plan.as_json()} for o, plan in self.ranked],
            "overrides": self.ranked[0][0] if self.ranked else None,
        }


def search_meshes(
    config: ConfigDict,
    name: str,
    n_slices: int = 1,
    *,
    limit: int,
    n_workers: int,
    track: Callable[..., Any],
) -> SearchResult:
    """Plan the most promising candidates on a topology.

    Args:
        config: Configuration, whose mesh, remat and microbatches are replaced.
        name: Name of the topology.
        n_slices: Number of slices.
        limit: Maximum number of compiled candidates.
        n_workers: Compiling processes.
        track: Wraps the iterable of candidates to show progress, like `tqdm`.

    Raises:
        UserError: No mesh is possible for the configuration.
    """
    target = topology(name, n_slices)
    considered = list(candidates(config, target, n_slices))
    if not considered:
        n, data = len(target.devices), config.data
        raise UserError(
            f"no mesh of {n} devices fits this configuration: batch size {data.batch_size}, "
            f"length {data.sequence_length}, layers, width, heads or experts are not divisible"
        )
    capacity = target.chip.memory or 0
    possible = [c for c in considered if c.estimate.least <= capacity]
    pool = _Pool(config, name, n_slices, n_workers)
    compiled = list(pool.compile(CandidateQueue(possible, capacity), limit, track))
    plans = [(c.overrides, plan) for c, plan in compiled if isinstance(plan, Plan)]
    fitting = [(overrides, plan) for overrides, plan in plans if plan.fits]
    fitting.sort(key=lambda found: order(found[1]))
    return SearchResult(
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


class CandidateQueue:
    """Queue of candidates, most promising first given what was compiled so far.

    Estimated times and memory are corrected by the errors of compiled candidates, weighted by
    similarity. Candidates that likely do not fit come last, least memory first: by their estimate,
    or because one with the same rematerialization that likely needs no more did not fit.
    """

    def __init__(self, candidates: Iterable[Candidate], capacity: float = inf):
        """Queue candidates for a device with this memory in bytes."""
        self.waiting = list(candidates)
        self._capacity = capacity
        self._too_large: dict[str, float] = {}
        # log(actual / estimated); NaN for times of programs that do not fit.
        self._errors: list[tuple[Candidate, np.ndarray]] = []

    def take(self) -> Candidate:
        """Remove and return the next candidate."""
        chosen = min(self.waiting, key=self._rank)
        self.waiting.remove(chosen)
        return chosen

    def learn(self, candidate: Candidate, plan: Plan) -> None:
        """Correct the estimates by a plan; demote candidates that likely need too much memory."""
        estimate, time = candidate.estimate, plan.time
        if not plan.fits:
            known = self._too_large.get(candidate.remat, inf)
            self._too_large[candidate.remat] = min(known, estimate.likely)
        times = (time.compute, time.memory, time.network) if time and plan.fits else (np.nan,) * 3
        actual = plan.memory.needed, *times
        errors = np.log(np.maximum(actual, 1e-9) / np.maximum(_figures(estimate), 1e-9))
        self._errors.append((candidate, errors))

    def _rank(self, candidate: Candidate) -> tuple[bool, float, float, float]:
        likely, *seconds = _figures(candidate.estimate) * self._correction(candidate)
        failed = self._too_large.get(candidate.remat, inf)
        doubtful = candidate.estimate.likely >= failed or likely > self._capacity
        return doubtful, likely if doubtful else 0.0, max(seconds), sum(seconds)

    def _correction(self, candidate: Candidate) -> np.ndarray:
        """Return correction factors of memory and times from the compiled candidates."""
        if not self._errors:
            return np.ones(4)
        errors = np.stack([error for _, error in self._errors])
        weights = np.array([_similarity(candidate, compiled) for compiled, _ in self._errors])
        known = weights[:, None] * np.isfinite(errors)
        total = (known * np.nan_to_num(errors)).sum(0)
        return np.exp(total / (PRIOR_WEIGHT + known.sum(0)))


# Weights of the cost model, and of shared properties of compiled candidates.
PRIOR_WEIGHT = 4.0
SAME_REMAT, SAME_AXES, SAME_MICROBATCHES, SAME_SEQUENCE = 8.0, 4.0, 2.0, 2.0


def _similarity(a: Candidate, b: Candidate) -> float:
    """Return the weight of a compiled candidate for correcting another."""
    weight = SAME_REMAT if a.remat == b.remat else 1.0
    weight *= SAME_AXES if a.axes == b.axes else 1.0
    for key, factor in (
        ("train.microbatches", SAME_MICROBATCHES),
        ("parallel.sequence", SAME_SEQUENCE),
    ):
        weight *= factor if a.overrides[key] == b.overrides[key] else 1.0
    return weight


def _figures(estimate: Estimate) -> np.ndarray:
    return np.array([estimate.likely, estimate.compute, estimate.memory, estimate.network])


def order(plan: Plan) -> tuple[float, float, float]:
    """Order by the bound on the time; then by time hidden only by overlap, then by memory."""
    bound, together = 0.0, 0.0
    if time := plan.time:
        bound, together = float(f"{time.bound:.3g}"), time.compute + time.memory + time.network
    return bound, together, plan.memory.needed


def candidates(config: ConfigDict, target: Topology, n_slices: int) -> Iterator[Candidate]:
    """Yield every possible mesh for the model, with every remat and number of microbatches.

    With tensor parallelism, both settings of sequence parallelism are tried.
    """
    single = {f"parallel.mesh.{axis}": 1 for axis in AXES}
    simplest = {"parallel.preset": "custom", "train.microbatches": 1, "parallel.sequence": False}
    experiment = build(overridden(config, simplest | single), target.devices[:1])
    cost_model, trial = CostModel(experiment, target.chip), experiment.config
    platform = target.devices[0].platform
    remats = [r for r in REMAT if platform != "cpu" or "offload" not in r]
    for found in meshes(experiment, len(target.devices) // n_slices):
        sizes = {"slice": n_slices, **found}
        on_mesh = {f"parallel.mesh.{axis}": sizes[axis] for axis in AXES}
        bandwidth = axis_bandwidth(sizes, target)
        choices = itertools.product(
            microbatches_of(config, len(target.devices)),
            (False, True)[: sizes["tensor"]],
            MICROBATCHES_PER_STAGE[: sizes["stage"]],
        )
        for microbatches, sequence, per_stage in choices:
            overrides = {
                "parallel.preset": "custom",
                **on_mesh,
                "parallel.sequence": sequence,
                "parallel.pipeline.microbatches": per_stage * sizes["stage"] * (sizes["stage"] > 1),
                "train.microbatches": microbatches,
            }
            for path, value in overrides.items():
                set_value(trial, path, value)
            try:
                schedule, _ = resolve_parallelism(trial, platform, sizes)
                for remat in remats:
                    settings = Settings(remat, microbatches, sequence)
                    estimate = cost_model.estimate(sizes, schedule, settings, bandwidth)
                    yield Candidate({**overrides, "train.remat": remat}, estimate)
            except UserError:
                continue


def microbatches_of(config: ConfigDict, n_devices: int) -> list[int]:
    """Return numbers of microbatches to try: divisors of the batch size, and the given one."""
    data = config.data
    most = data.batch_size * data.sequence_length / n_devices / TOKENS_OF_MICROBATCH
    found = [d for d in _divisors(data.batch_size) if d <= max(most, MICROBATCHES)]
    return sorted({*found, config.train.microbatches})


def axis_bandwidth(sizes: Mapping[str, int], target: Topology) -> Callable[..., float]:
    """Return a function of mesh axes: bytes/s from a device to the others along them."""
    devices = cache(lambda: make_mesh(sizes, target.devices).devices)

    @cache
    def bandwidth(*axes: str) -> float:
        along = tuple(slice(None) if axis in axes else 0 for axis in AXES)
        crossed = interconnect(target.chip, list(devices()[along].flatten()), target.sides)
        return (crossed.bandwidth or inf) * crossed.spread

    return bandwidth


def meshes(experiment: Experiment, n_devices: int) -> Iterator[dict[str, int]]:
    """Yield the factorizations of a slice's devices into mesh axes that divide the model.

    Stages divide the layers, context the sequence, expert the experts.
    """
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
    """Return a copy of a configuration with overrides applied."""
    config = config.copy_and_resolve_references()
    for path, value in overrides.items():
        set_value(config, path, value)
    return config


def command_line(overrides: Mapping[str, Any]) -> str:
    """Return overrides as options of `lm train`."""
    return " ".join(f"--config.{path}={value}" for path, value in overrides.items())


@dataclass(frozen=True)
class _Pool:
    """Process pool that compiles candidates of a configuration for a topology."""

    config: ConfigDict
    topology: str
    n_slices: int
    n_workers: int

    def compile(
        self, queue: CandidateQueue, limit: int, track: Callable[..., Any]
    ) -> Iterator[tuple[Candidate, Plan | str]]:
        """Compile at most `limit` candidates; yield each with its plan, or a one-line error."""
        limit = min(limit, len(queue.waiting))
        if not limit:
            return
        if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":  # JAX's default
            # Inherited by the processes: a candidate that does not fit needs no warning here.
            os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
        given = dict(flatten(self.config))
        plugins = SCHEMA.plugins(), self.config.to_dict()
        spawn = get_context("spawn")
        with starting_workers():
            new = ProcessPoolExecutor(self.n_workers, spawn, _start_worker, plugins)
        with new as pool:
            running: deque[tuple[Candidate, Future[Plan]]] = deque()
            for i in track(range(limit), total=limit):
                for _ in range(min(self.n_workers - len(running), limit - i - len(running))):
                    candidate = queue.take()
                    values = {**given, **candidate.overrides}
                    with starting_workers():
                        future = pool.submit(_plan, values, self.topology, self.n_slices)
                    running.append((candidate, future))
                candidate, future = running.popleft()
                try:
                    plan = future.result()
                    queue.learn(candidate, plan)
                    yield candidate, plan
                except (UserError, RuntimeError, NotImplementedError) as error:
                    yield candidate, " ".join(str(error).split())[:200]


def _plan(values: Mapping[str, Any], name: str, n_slices: int) -> Plan:
    """Plan a candidate in a worker process."""
    jax.config.update("jax_platforms", "cpu")
    return make_plan(overridden(default(), values), topology(name, n_slices), n_slices)


def _start_worker(plugins: list[dict[str, Any]], config: dict[str, Any]) -> None:
    end_with_parent()
    import_plugins(plugins, config)
