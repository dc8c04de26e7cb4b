"""Training of a run: from a configuration and a workdir to a trained model."""

from __future__ import annotations

from math import prod
from pathlib import Path

import jax
from ml_collections import ConfigDict

from lm.data.tokenizers.tokenizer import Tokenizer
from lm.errors import UserError
from lm.experiment import Experiment, build_with_data
from lm.models.variables import flat
from lm.parallel import sharding
from lm.parallel.mesh import is_primary_host
from lm.runs.checkpoints import (
    Checkpoints,
    Log,
    ignore_line,
    prepare_workdir,
    require_no_lost_steps,
    set_lost_run_aside,
)
from lm.storage import open_run_folder, storage_path
from lm.train_step import TrainState
from lm.training.loop import Loop, Outputs
from lm.training.monitor import Clock, MetricsWriter, stop_requests, watchdog
from lm.validation import check


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    log: Log = ignore_line,
    progress: bool = False,
    restart: bool = False,
) -> bool:
    """Train the run in `workdir`, or continue it.

    Args:
        config: configuration, resolved or not.
        workdir: folder of the run, created if it is not there.
        log: receives the lines for the user.
        progress: show progress bars on stderr, and the last evaluation on stdout.
        restart: begin at step 0 if no checkpoint is left of a run that had some, which moves to
            the folder restarted.N in `workdir`.

    Returns:
        Whether the last step was reached; False if the run was asked to stop and can continue.

    Raises:
        UserError: configuration, data and workdir do not go together.
    """
    workdir = open_run_folder(str(workdir))
    with stop_requests() as stop:
        check(config, jax.devices()[0].platform, len(jax.devices()))
        if jax.process_count() > 1:
            from lm.parallel.agreement import require_same_start

            require_same_start(config)
        experiment, dataset = build_with_data(
            config, jax.devices(), progress=progress and is_primary_host()
        )
        config = experiment.config
        if config.eval.best and not dataset.validation:
            raise UserError(
                f"--config.eval.best={config.eval.best} needs validation data: set "
                "--config.data.validation_source or --config.data.validation_fraction"
            )
        if restart:
            set_lost_run_aside(workdir)
        metadata = prepare_workdir(workdir, config, dataset, write=is_primary_host())
        log(describe(experiment))
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint, metadata)
        state = checkpoints.restore(experiment.state_shapes, experiment.state_sharding, log)
        if state is None:
            require_no_lost_steps(workdir)
            state = _first_state(experiment, dataset.tokenizer, log)
        first_step = int(jax.device_get(state.step))
        if first_step:
            log(f"continuing from step {first_step}")
        clock = Clock(workdir / "clock.json", first_step)
        writer = MetricsWriter(
            workdir,
            first_step,
            config.train.steps,
            tensorboard=config.log.tensorboard,
            progress=progress,
            silent=not is_primary_host(),
        )
        best = None
        if config.eval.best:
            from lm.training.best_checkpoint import BestCheckpoint

            best = BestCheckpoint(workdir, config.eval.best, config.checkpoint, metadata)
        try:
            with watchdog(config.train.stall_seconds) as heartbeat:
                outputs = Outputs(checkpoints, best, writer, clock, heartbeat)
                loop = Loop(experiment, dataset, state, first_step, outputs)
                finished = loop.run(stop)
                with clock.part("checkpoint"):
                    checkpoints.close()
                    if best is not None:
                        best.close()
        finally:
            writer.close()
        if is_primary_host():
            clock.save(loop.step)
            _summarize(loop, clock, finished, workdir, log)
            if progress and finished:
                for name, value in loop.last_evaluation.items():
                    print(f"validation {name.replace('_', ' ')}: {value:.6g}")
        return finished


def _first_state(experiment: Experiment, tokenizer: Tokenizer, log: Log) -> TrainState:
    init = experiment.config.init
    if not init["from"] and not init.vectors:
        return experiment.init_state()
    from lm.training.warm_start import initial_state

    return initial_state(experiment, tokenizer, log)


def describe(experiment: Experiment) -> str:
    """Return the lines printed before training.

    They name model size, devices, mesh, dtype and attention kernel, the pipeline's schedule, and
    the parameter dimensions that stay replicated because the mesh does not divide them.
    """
    config, mesh = experiment.config, experiment.mesh
    shapes = flat(experiment.param_shapes)
    n_params = sum(leaf.size for leaf in shapes.values())
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    devices = mesh.devices.flatten()
    lines = [
        f"{config.model.family} of {n_params:,} parameters on {prod(mesh.devices.shape)} "
        f"{devices[0].device_kind} ({axes or 'one device'}), {jax.process_count()} process(es); "
        f"{config.model.dtype}, {_attention(experiment)}"
    ]
    if (schedule := experiment.pipeline).stages > 1:
        lines.append(
            f"pipeline of {schedule.stages} stages × {schedule.repeats} repeat(s), "
            f"{schedule.microbatches} microbatches: idle {schedule.bubble:.1%} of the time"
        )
    for path, leaf in sorted(shapes.items()):
        for axis in sharding.replicated_axes(mesh, experiment.param_infos[path].axes, leaf.shape):
            lines.append(
                f"{path} {leaf.shape}: the mesh does not divide its {axis!r} dimension, which "
                "stays whole on every device"
            )
    return "\n".join(lines)


def _attention(experiment: Experiment) -> str:
    attention = experiment.attention
    n_shards = experiment.mesh.shape[sharding.LENGTH_AXIS]
    across = f", {attention.across} over {n_shards} parts of the sequence" if n_shards > 1 else ""
    return f"attention kernel {attention.kernel} ({attention.why}){across}"


def _summarize(loop: Loop, clock: Clock, finished: bool, workdir: Path, log: Log) -> None:
    summary = clock.summary(loop.step)
    seconds = {name: round(value, 1) for name, value in summary["seconds"].items() if value >= 0.05}
    split = ", ".join(f"{name} {value} s" for name, value in seconds.items())
    starts = summary["starts"]
    log(f"time: {split}; goodput {summary['goodput']:.0%} over {starts} start(s)")
    if not finished:
        log(f"asked to stop: state saved at step {loop.step}; the same command continues")
        return
    log(f"finished {loop.step} steps; run is in {storage_path(workdir)}")
