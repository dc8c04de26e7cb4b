"""The best mesh, rematerialisation and number of microbatches for a topology.

Candidates that cannot fit by arithmetic are never compiled: their state, gradients and kept
activations alone are more than a device has. The rest are compiled in processes of their own, the
ones that should be fastest first, and ranked by their bound on the time of a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from math import prod
from multiprocessing import get_context
from typing import Any

import jax
from ml_collections import ConfigDict

from lm.config import default, flatten, set_value
from lm.errors import UserError
from lm.experiment import Experiment, build
from lm.planning.plan import Plan, make_plan, state_memory
from lm.planning.topologies import Topology, topology

REMAT = ("none", "dots", "full")
MICROBATCHES = (1, 2, 4, 8)
# FLOPs of a step over those of a step that recomputes nothing, roughly.
RECOMPUTED = {"none": 1.0, "dots": 1.05, "full": 4 / 3}

Overrides = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """Overrides of a configuration, and the least bytes a device that they can need."""

    overrides: Overrides
    least_memory: int
    cost: float


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
    possible = [c for c in considered if c.least_memory <= capacity]
    possible.sort(key=lambda c: c.cost)
    chosen = possible[:limit]
    plans, failed = _compile(config, name, n_slices, [c.overrides for c in chosen], workers, track)
    fitting = [(overrides, plan) for overrides, plan in plans if plan.fits]
    fitting.sort(key=_order)
    return Search(
        ranked=tuple(fitting),
        considered=len(considered),
        too_large=len(considered) - len(possible) + len(plans) - len(fitting),
        not_compiled=len(possible) - len(chosen),
        failed=tuple(failed),
    )


def _order(found: tuple[Overrides, Plan]) -> tuple[float, float]:
    """By time; where that is not known, by memory."""
    _, plan = found
    return (plan.time.bound if plan.time else 0.0, plan.memory.total)


def candidates(config: ConfigDict, place: Topology, n_slices: int) -> Iterator[Candidate]:
    """Every mesh that suits the model, with every remat and number of microbatches.

    The axes stage, expert and context stay as they are configured.
    """
    others = (config.parallel.mesh[axis] for axis in ("stage", "expert", "context"))
    for sizes in meshes(len(place.devices) // n_slices // prod(others)):
        mesh = {f"parallel.mesh.{axis}": size for axis, size in sizes.items()}
        base = {"parallel.preset": "custom", **mesh, "parallel.mesh.slice": n_slices}
        try:
            experiment = build(overridden(config, base | {"train.microbatches": 1}), place.devices)
        except UserError:
            continue
        parameters, optimizer, gradients, _ = state_memory(experiment)
        state = parameters + optimizer + gradients
        rows = experiment.config.data.batch_size // (n_slices * sizes["data"] * sizes["fsdp"])
        for remat, microbatches in itertools.product(REMAT, MICROBATCHES):
            if rows % microbatches:
                continue
            kept = kept_activations(experiment, remat, rows // microbatches, sizes["tensor"])
            yield Candidate(
                {**base, "train.remat": remat, "train.microbatches": microbatches},
                state + kept,
                _cost(sizes, remat, microbatches),
            )


def meshes(n_devices: int) -> Iterator[dict[str, int]]:
    """Ways to write the devices of a slice as data × fsdp × tensor."""
    divisors = [d for d in range(1, n_devices + 1) if n_devices % d == 0]
    for tensor, fsdp in itertools.product(divisors, repeat=2):
        if n_devices % (tensor * fsdp) == 0:
            yield {"data": n_devices // (tensor * fsdp), "fsdp": fsdp, "tensor": tensor}


def kept_activations(experiment: Experiment, remat: str, rows: int, tensor: int) -> int:
    """Least bytes of activations that the backward pass needs from the layers' forward pass.

    "full" keeps a layer's input; "dots" also the results of its matrix products.
    """
    model, length = experiment.config.model, experiment.config.data.sequence_length
    width = model.d_model
    if remat != "full":
        projected = 2 * model.n_heads * model.head_dim + 2 * model.n_kv_heads * model.head_dim
        width += (projected + model.d_ff) // tensor
    item = 2 if model.dtype == "bfloat16" else 4
    return rows * length * width * model.n_layers * item


def _cost(sizes: Mapping[str, int], remat: str, microbatches: int) -> float:
    """What to try first: little recomputed, few microbatches, little tensor parallelism."""
    tensor = 1 + 0.1 * (sizes["tensor"] - 1) ** 0.5
    gathers = 1 + 0.02 * (microbatches - 1) * (sizes["fsdp"] > 1)
    return RECOMPUTED[remat] * tensor * gathers


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
    chosen: Sequence[Overrides],
    workers: int,
    track: Callable[..., Any],
) -> tuple[list[tuple[Overrides, Plan]], list[str]]:
    """Plans of the chosen candidates, and one line for each that failed to compile."""
    plans: list[tuple[Overrides, Plan]] = []
    failed: list[str] = []
    if not chosen:
        return plans, failed
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        pending: dict[Future[Plan], Overrides] = {
            pool.submit(_plan, {**dict(flatten(config)), **o}, name, n_slices): o for o in chosen
        }
        for done in track(as_completed(pending), total=len(pending)):
            overrides = pending[done]
            try:
                plans.append((overrides, done.result()))
            except (UserError, RuntimeError, NotImplementedError) as error:
                reason = " ".join(str(error).split())
                failed.append(f"{command_line(overrides)}: {reason[:200]}")
    return plans, failed


def _plan(values: Mapping[str, Any], name: str, n_slices: int) -> Plan:
    """Run in a process of its own."""
    jax.config.update("jax_platforms", "cpu")
    return make_plan(overridden(default(), values), topology(name, n_slices), n_slices)
