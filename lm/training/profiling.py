"""Profiling of training steps: a trace for xprof and Perfetto, and a device memory profile."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

import jax

from lm.parallel.mesh import is_primary_host
from lm.runs.checkpoints import Log, disk_errors
from lm.storage import storage_path, upload_changes
from lm.train_step import TrainState


class Dispatching(Protocol):
    """Training loop.

    Attributes:
        state: newest state.
        dispatches: ranges of steps; each is run by one call of the compiled program.
    """

    state: TrainState
    dispatches: Iterable[range]


@contextmanager
def profile(loop: Dispatching, steps: str, workdir: Path, log: Log) -> Iterator[None]:
    """Trace the dispatches of `train.profile` in a loop that runs inside the context.

    The trace goes to WORKDIR/profile, where xprof finds it. Each of several processes has its own
    subfolder, because JAX names files by host and second. The primary host also writes
    perfetto_trace.json.gz, and every process memory-PROCESS.pprof: device memory after these
    steps.

    Args:
        loop: loop, before it runs.
        steps: START:STEPS, the first step (from 0) and the number of steps.
        workdir: folder of the run.
        log: called with the line that says where the trace is.
    """
    ranges = _profiled(loop, loop.dispatches, steps, workdir / "profile", log)
    loop.dispatches = ranges
    with closing(ranges):
        yield


def _profiled(
    loop: Dispatching, planned: Iterable[range], steps: str, folder: Path, log: Log
) -> Generator[range]:
    first, n_steps = map(int, steps.split(":"))
    last = first + n_steps - 1
    traced: list[int] = []
    number = jax.process_index()
    trace_folder = folder / f"process-{number}" if jax.process_count() > 1 else folder

    def finish() -> None:
        jax.block_until_ready(loop.state)
        with disk_errors(storage_path(folder)):
            jax.profiler.stop_trace()
            jax.profiler.save_device_memory_profile(folder / f"memory-{number}.pprof")
            upload_changes()
        log(f"profile of steps {traced[0]} to {traced[-1]}: {storage_path(folder)}")

    tracing = False
    try:
        for dispatch in planned:
            if tracing and dispatch.start > last:
                tracing = False
                finish()
            elif not traced and first < dispatch.stop and dispatch.start <= last:
                jax.block_until_ready(loop.state)
                jax.profiler.start_trace(trace_folder, create_perfetto_trace=is_primary_host())
                tracing = True
            if tracing:
                traced += dispatch
            with jax.profiler.StepTraceAnnotation("train", step_num=dispatch.start):
                yield dispatch
    finally:
        if tracing:
            finish()
        elif not traced:
            log(f"note: --config.train.profile={steps}: these steps were not run by this start")
