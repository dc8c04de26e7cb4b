"""`lm train`: from a configuration and a folder to a trained model."""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path

import jax
from ml_collections import ConfigDict

from lm.data.dataset import open_dataset
from lm.errors import UserError
from lm.experiment import Experiment, build, reads_records
from lm.objectives.registry import make_objective
from lm.optim.parameter_groups import flat, nested
from lm.parallel import sharding as rules
from lm.parallel.hosts import is_lead
from lm.runs import workdir as workdirs
from lm.runs.checkpoints import Checkpoints
from lm.runs.saved_params import mean_params, saved_checkpoints
from lm.storage import origin
from lm.train_step import Params
from lm.training.best_checkpoint import FOLDER, BestCheckpoint
from lm.training.clock import Clock
from lm.training.loop import Loop
from lm.training.metrics import MetricsWriter, SilentWriter
from lm.training.preemption import stop_requests
from lm.training.warm_start import initial_state
from lm.training.watchdog import watchdog


def train(config: ConfigDict, workdir: Path) -> bool:
    """Train, or continue, the run in `workdir`; false if it was asked to stop and can continue."""
    with stop_requests() as stop:
        experiment = build(config, jax.devices())
        config = experiment.config
        dataset = open_dataset(config.data, reads_records(config), progress=is_lead())
        n_extra_ids = make_objective(config, dataset.tokenizer).n_extra_ids
        if dataset.tokenizer.vocab_size + n_extra_ids > config.model.vocab_size:
            raise UserError(
                f"--config.model.vocab_size={config.model.vocab_size} is smaller than the "
                f"tokenizer's {dataset.tokenizer.vocab_size} and {n_extra_ids} of "
                f"--config.objective.name={config.objective.name}"
            )
        if config.eval.best and not dataset.validation:
            raise UserError(
                f"--config.eval.best={config.eval.best} needs validation data: set "
                "--config.data.validation_source or --config.data.validation_fraction"
            )
        metadata = workdirs.prepare(workdir, config, dataset, write=is_lead())
        report(describe(experiment))
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint, metadata)
        state = checkpoints.restore(experiment.state_shapes, experiment.state_sharding, report)
        if state is None:
            state = initial_state(experiment, dataset.tokenizer, report)
        first_step = int(jax.device_get(state.step))
        if first_step:
            report(f"continuing from step {first_step}")
        clock = Clock(workdir / "clock.json", first_step)
        writer = (
            MetricsWriter(workdir, first_step, config.train.steps, config.log.tensorboard)
            if is_lead()
            else SilentWriter()
        )
        best = BestCheckpoint(workdir, config.eval.best, config.checkpoint, metadata)
        try:
            with watchdog(config.train.stall_seconds) as beat:
                parts = checkpoints, best, writer, clock, beat
                loop = Loop(experiment, dataset, state, first_step, *parts)
                finished = loop.run(stop)
                with clock.part("checkpoint"):
                    checkpoints.close()
                    best.close()
        finally:
            writer.close()
        if is_lead():
            clock.save(loop.step)
            _summarise(loop, clock, finished, workdir)
        return finished


def restore_params(
    experiment: Experiment, workdir: Path, average: int = 1, best: bool = False
) -> tuple[Params, int]:
    """The newest parameters of a run, laid out for `experiment`, and their step.

    With `best` those that config.eval.best chose instead; with `average` the mean of the last so
    many checkpoints. Low-rank updates are merged, so
    `experiment` has none.
    """
    shapes = flat(experiment.state_shapes.params)
    checkpoints = saved_checkpoints(workdir / FOLDER if best else workdir, report)
    found = checkpoints[0].shapes
    for path in sorted({*shapes, *found}):
        if path not in shapes or path not in found or shapes[path].shape != found[path].shape:
            raise UserError(
                f"{path} is not as in the run in {origin(workdir)}: "
                "leave its model configuration alone"
            )
    shardings = flat(experiment.state_sharding.params)
    params, steps = mean_params(checkpoints, average, shardings, report)
    if average > 1:
        report(f"mean of the checkpoints of steps {', '.join(map(str, steps))}")
    return nested(params), steps[0]


def report(message: str) -> None:
    """A line on stderr, from the lead process."""
    if is_lead():
        print(message, file=sys.stderr, flush=True)


def describe(experiment: Experiment) -> str:
    """What is about to run: size, devices, mesh, kernels, and what the mesh could not shard."""
    config, mesh = experiment.config, experiment.mesh
    shapes = jax.tree.leaves_with_path(experiment.state_shapes.params)
    n_params = sum(leaf.size for _, leaf in shapes)
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
    for (path, leaf), names in zip(shapes, jax.tree.leaves(experiment.param_names), strict=True):
        for name in rules.replicated_axes(mesh, names, leaf.shape):
            lines.append(
                f"{'/'.join(str(part.key) for part in path)} {leaf.shape}: the mesh does not "
                f"divide its {name!r} dimension, which stays whole on every device"
            )
    return "\n".join(lines)


def _attention(experiment: Experiment) -> str:
    """Which attention kernel runs, and why that one."""
    attention = experiment.attention
    parts = experiment.mesh.shape[rules.LENGTH_AXIS]
    across = f", {attention.across} over {parts} parts of the sequence" if parts > 1 else ""
    return f"attention kernel {attention.kernel} ({attention.why}){across}"


def _summarise(loop: Loop, clock: Clock, finished: bool, workdir: Path) -> None:
    summary = clock.summary(loop.step)
    seconds = {name: round(value, 1) for name, value in summary["seconds"].items() if value >= 0.05}
    split = ", ".join(f"{name} {value} s" for name, value in seconds.items())
    report(f"time: {split}; goodput {summary['goodput']:.0%} over {summary['starts']} start(s)")
    if not finished:
        report(f"asked to stop: state saved at step {loop.step}; the same command continues")
        return
    report(f"finished {loop.step} steps; run is in {origin(workdir)}")
    for name, value in loop.last_evaluation.items():
        print(f"validation {name.replace('_', ' ')}: {value:.6g}")
