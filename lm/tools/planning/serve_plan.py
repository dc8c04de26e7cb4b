"""Plan of serving: memory, rows, and a bound on the tokens/s of the paged engine on a chip.

The engine's two programs are compiled with its own shapes (`lm/decoding/engine/shapes.py`): the
longest prompt chunk, and a step of all rows. The compiler reports their memory. The bound is
computed analytically, because loops of unknown length hide bytes and FLOPs: a step reads the
weights and the keys and values of all rows once, at memory bandwidth; or it multiplies at the
chip's peak; or it sends what the compiled step sends (without latencies). Rows are at full context,
every layer reads all of it, and all rows decode greedily.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

import jax
from ml_collections import ConfigDict

from lm.decoding.engine.shapes import lower_programs, state_shapes
from lm.decoding.engine.sizes import (
    EngineOptions,
    choose_context,
    count_pages,
    is_pageable,
    longest_chunk,
    page_bytes,
    pages_per_row,
)
from lm.decoding.weights import prepare
from lm.errors import UserError
from lm.experiment import Experiment, build
from lm.models.attention import CALLED
from lm.models.variables import Params
from lm.tools.planning.described_device import kernels_for
from lm.tools.planning.hlo import parse_hlo
from lm.tools.planning.plan import Time, Traffic, list_traffic, network_seconds
from lm.tools.planning.plan_report import size_text
from lm.tools.planning.program import OutOfMemory, Program, compile_lowered
from lm.tools.planning.serve_work import Work, shard_bytes, work_of_prompt, work_of_step
from lm.tools.planning.topologies import Topology

MOST_ROWS = 1024  # maximum number of rows tried


@dataclass(frozen=True)
class ServeMemory:
    """Bytes on a device.

    Attributes:
        weights: parameters in decoding form.
        pages: pages of the cache.
        texts: other state of the rows.
        temporaries: additional needs of the larger program, including its code.
        needed: sum of these.
        capacity: device memory that JAX allocates from.
    """

    weights: int
    pages: int
    texts: int
    temporaries: int
    needed: int
    capacity: int


@dataclass(frozen=True)
class ServePlan:
    """Plan of an engine on a topology.

    Attributes:
        topology: name of the devices.
        n_devices: number of devices.
        mesh: sizes of the mesh axes larger than 1.
        rows: concurrent requests.
        context: maximum tokens of a prompt and its reply.
        page_size: tokens per page.
        pages: pages of the cache.
        chunk: tokens of the longest prompt chunk.
        fits: whether both programs fit into the device's memory.
        memory: memory of a device.
        step: terms of the bound on a step of all rows; None if the chip's rates are unknown.
        first_chunk: same for a prompt of one chunk.
        whole_prompt: same for a prompt that fills the context, in chunks.
        collectives: communication of a step of all rows.
        compile_seconds: time to lower and compile.
    """

    topology: str
    n_devices: int
    mesh: dict[str, int]
    rows: int
    context: int
    page_size: int
    pages: int
    chunk: int
    fits: bool
    memory: ServeMemory
    step: Time | None
    first_chunk: Time | None
    whole_prompt: Time | None
    collectives: tuple[Traffic, ...]
    compile_seconds: float

    @property
    def tokens_per_row(self) -> float:
        """Average number of tokens per row that the pages can hold."""
        return min(self.pages * self.page_size / self.rows, self.context)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of all rows, at the bound."""
        return self.rows / self.step.bound if self.step else None

    def as_json(self) -> dict[str, Any]:
        """Return all values."""
        derived = {
            "cached_tokens": self.pages * self.page_size,
            "tokens_per_row": self.tokens_per_row,
            "tokens_per_second": self.tokens_per_second,
        }
        return asdict(self) | derived


def plan_serving(
    config: ConfigDict, topology: Topology, rows: int | None = None, context: int = 0
) -> ServePlan:
    """Compile the programs of the engine that `lm serve` would run, and analyze them.

    Args:
        config: configuration.
        topology: devices to compile for.
        rows: concurrent requests; None: the largest power of two, at most `MOST_ROWS`, whose full
            contexts fit.
        context: maximum tokens of a prompt and its reply; 0: the model's context length.

    Raises:
        UserError: the engine does not support this model or context.
    """
    served = _prepare(build(config, topology.devices), topology)
    options = EngineOptions(rows or MOST_ROWS, context)
    while rows is None and options.n_rows > 1 and not served.holds_whole_contexts(options):
        options = replace(options, n_rows=options.n_rows // 2)
    plan = served.plan(options)
    while rows is None and options.n_rows > 1 and not plan.fits:
        options = replace(options, n_rows=options.n_rows // 2)
        plan = served.plan(options)
    return plan


def _prepare(experiment: Experiment, topology: Topology) -> _Served:
    if not is_pageable(experiment):
        raise UserError(
            "--serve plans decoders with only attention layers, in one pipeline stage; others are "
            "served in whole batches: plan a step of those with --decode"
        )
    shapes = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        experiment.inference_shapes,
        experiment.inference_sharding,
    )
    prepared, params = prepare(experiment, shapes)
    return _Served(prepared, params, topology)


@dataclass(frozen=True)
class _Served:
    """Model on described devices: its experiment and the shapes of its parameters, prepared."""

    experiment: Experiment
    params: Params
    topology: Topology

    @property
    def capacity(self) -> int:
        """Bytes of a device that JAX allocates from; by default three quarters on GPU."""
        platform = self.topology.devices[0].platform
        is_gpu = CALLED.get(platform, platform) == "gpu"
        part = float(os.environ.get("XLA_CLIENT_MEM_FRACTION", 0.75)) if is_gpu else 1.0
        return int(part * (self.topology.chip.memory or 0))

    @property
    def free(self) -> int:
        return self.capacity - shard_bytes(self.params)

    def holds_whole_contexts(self, options: EngineOptions) -> bool:
        """Return whether the engine gets pages for the full context of every row."""
        of_all = options.n_rows * pages_per_row(self.experiment, options)
        return count_pages(self.experiment, options, self.free) == of_all

    def plan(self, options: EngineOptions) -> ServePlan:
        """Compile both programs and analyze them."""
        start, ex = time.monotonic(), self.experiment
        n_pages = count_pages(ex, options, self.free)
        with kernels_for(ex.mesh.devices):
            lowered = lower_programs(ex, self.params, options, n_pages)
        programs = {name: compile_lowered(x, ex, start) for name, x in lowered.items()}
        moved = {name: self._traffic(x) for name, x in programs.items()}
        memory = self._memory(options, n_pages, programs.values())
        work = self.experiment, self.params, options
        chunks = [self._time(x, moved["chunk"]) for x in work_of_prompt(*work)]
        return ServePlan(
            topology=self.topology.name,
            n_devices=len(self.topology.devices),
            mesh={axis: size for axis, size in ex.mesh.shape.items() if size > 1},
            rows=options.n_rows,
            context=choose_context(ex, options),
            page_size=options.page_size,
            pages=n_pages,
            chunk=longest_chunk(ex, options),
            fits=memory.needed <= self.capacity and None not in moved.values(),
            memory=memory,
            step=self._time(work_of_step(*work, n_pages), moved["decode"]),
            first_chunk=chunks[0],
            whole_prompt=_one_after_the_other(chunks),
            collectives=moved["decode"] or (),
            compile_seconds=round(time.monotonic() - start, 2),
        )

    def _memory(
        self, options: EngineOptions, n_pages: int, programs: Iterable[Program | OutOfMemory]
    ) -> ServeMemory:
        state = shard_bytes(state_shapes(self.experiment, options, n_pages))
        weights, pages = shard_bytes(self.params), n_pages * page_bytes(self.experiment, options)
        held = weights + state
        needed = max(held, *(x.needed for x in programs))
        return ServeMemory(weights, pages, state - pages, needed - held, needed, self.capacity)

    def _traffic(self, program: Program | OutOfMemory) -> tuple[Traffic, ...] | None:
        """List the communication of a step or chunk; None if it does not fit."""
        if isinstance(program, OutOfMemory):
            return None
        # One iteration of the loop over steps; options other than greedy decoding are in the
        # second branch of a conditional each.
        module = parse_hlo(program.text, taken=0.0, unknown_trips=1)
        return list_traffic(module, self.experiment.mesh, self.topology)

    def _time(self, work: Work, moved: tuple[Traffic, ...] | None) -> Time | None:
        chip = self.topology.chip
        if moved is None or not chip.peak_flops or not chip.memory_bandwidth:
            return None
        terms = (
            work.flops / chip.peak_flops,
            work.bytes / chip.memory_bandwidth,
            network_seconds(moved),
        )
        return Time(*terms, bound=max(terms))


def _one_after_the_other(times: list[Time | None]) -> Time | None:
    """Return the sums of the terms and of the bounds."""
    known = [astuple(x) for x in times if x is not None]
    return Time(*map(sum, zip(*known, strict=True))) if len(known) == len(times) else None


def serve_plan_text(plan: ServePlan) -> str:
    """Format a plan for a terminal."""
    m, mesh = plan.memory, ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines = [
        f"{plan.topology}, {plan.n_devices} devices ({mesh or 'one device'}): {plan.rows} rows, "
        f"context {plan.context:,}",
        f"memory a device    {verdict}: {size_text(m.needed)} of {size_text(m.capacity)}: weights "
        f"{size_text(m.weights)}, pages {size_text(m.pages)}, texts {size_text(m.texts)}, "
        f"temporaries {size_text(m.temporaries)}",
        f"cache              {plan.pages:,} pages of {plan.page_size} tokens: "
        f"{plan.pages * plan.page_size:,} tokens, {plan.tokens_per_row:,.0f} a row",
    ]
    if plan.step and plan.first_chunk and plan.whole_prompt:
        lines += [
            f"decoding           {_terms(plan.step)}: {plan.tokens_per_second:,.0f} tokens/s, "
            f"{1 / plan.step.bound:,.0f} a row",
            f"first token        {_terms(plan.first_chunk)}, of a prompt of "
            f"{min(plan.chunk, plan.context - 1):,} tokens",
            f"                   {_terms(plan.whole_prompt)}, of {plan.context - 1:,} tokens",
        ]
    return "\n".join([*lines, f"compiled in {plan.compile_seconds:.0f} s"])


def _terms(t: Time) -> str:
    parts = (f"{name} {1e3 * getattr(t, name):.3f}" for name in ("compute", "memory", "network"))
    return f"{1e3 * t.bound:.3f} ms at least ({', '.join(parts)})"
