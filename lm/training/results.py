"""Results of a run: evaluations during training, best checkpoint and final report."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.stages import Wrapped
from ml_collections import ConfigDict

from lm.data.batches import Batches
from lm.data.dataset import Store
from lm.errors import UserError
from lm.evaluation.loss import evaluate_loss, figure_text, losses_by_source
from lm.experiment import Experiment
from lm.parallel.hosts import COMPILING
from lm.runs.checkpoints import BEST_FOLDER, Checkpoints, Log
from lm.runs.workdir import saved_metadata
from lm.storage import storage_path
from lm.train_step import TrainState
from lm.training.monitor import Clock, Heartbeat, MetricsWriter


class BestCheckpoint:
    """Best state so far by a validation metric; restarts continue the comparison."""

    def __init__(self, workdir: Path, config: ConfigDict, metadata: dict[str, Any]):
        """Open the folder "best" of a run.

        Args:
            workdir: folder of the run.
            config: configuration; `eval.best` names the metric, such as "accuracy", or "-loss" if
                lower is better.
            metadata: metadata of the run, written into the checkpoint.
        """
        self._figure = figure = config.eval.best
        self._name = figure.removeprefix("-")
        self._sign = -1.0 if figure.startswith("-") else 1.0
        options = ConfigDict({**config.checkpoint, "keep_last": 1, "keep_every_steps": 0})
        self._checkpoints = Checkpoints(workdir / BEST_FOLDER / "checkpoints", options, metadata)
        self._value = -float("inf")
        if (step := self._checkpoints.latest_step) is not None:
            folder = storage_path(workdir / BEST_FOLDER / "checkpoints") / str(step)
            kept = saved_metadata(folder)
            if kept is None:
                raise UserError(f"{folder} is damaged (its metadata): move it away")
            before = kept.get("figure", figure)
            if before != figure or self._name not in kept:
                raise UserError(
                    f"--config.eval.best={figure}: {workdir / BEST_FOLDER} has the best "
                    f"checkpoint by {before if before != figure else 'another metric'}: move that "
                    "folder "
                    "away"
                )
            self._value = self._sign * kept[self._name]

    def offer(self, step: int, state: TrainState, figures: Mapping[str, float]) -> None:
        """Save the state if its metric improves on the saved one.

        Raises:
            UserError: the evaluation does not report this metric.
        """
        if self._name not in figures:
            known = ", ".join(figures)
            raise UserError(f"--config.eval.best={self._name} is not one of the metrics: {known}")
        value = self._sign * figures[self._name]
        # Orbax skips steps up to its newest one; a restart repeats such steps.
        is_new = step > (self._checkpoints.latest_step or 0)
        if is_new and value > self._value:
            self._value = value
            notes = {self._name: figures[self._name], "figure": self._figure}
            self._checkpoints.save(step, state, notes)
            # Otherwise a kill after the run's own checkpoint of this step could lose the best one.
            self._checkpoints.wait()

    def close(self) -> None:
        """Wait until the best checkpoint is on disk."""
        self._checkpoints.close()


@dataclass(frozen=True)
class Outputs:
    """Destinations of what a run produces.

    Attributes:
        checkpoints: checkpoints of the run.
        best: best checkpoint by `--config.eval.best`, or None.
        writer: metrics.jsonl, trackers and progress bar.
        clock: wall time by category.
        heartbeat: called whenever the run makes progress.
        workdir: local folder of the run.
    """

    checkpoints: Checkpoints
    best: BestCheckpoint | None
    writer: MetricsWriter
    clock: Clock
    heartbeat: Heartbeat
    workdir: Path


# States of an evaluating process; all processes act on the maximum.
READY, BUSY, STOPPING = range(3)
_POLL_SECONDS = 0.5


class _AskedToStop(BaseException):
    """Abort of an unfinished evaluation; a BaseException, so that no library handles it."""


def evaluate_state(
    experiment: Experiment,
    state: TrainState,
    step: int,
    validation: tuple[Batches, Sequence[Store]],
    outputs: Outputs,
    agree: Callable[[int], int],
) -> dict[str, float] | None:
    """Evaluate the validation data and write the metrics to the outputs of the run.

    Args:
        experiment: experiment on a mesh.
        state: its training state.
        step: number of updates so far.
        validation: batches to evaluate, and the stores they come from.
        outputs: destinations of metrics, best checkpoint and heartbeats.
        agree: returns the maximum state (READY, BUSY) over all processes; STOPPING if one was asked
            to stop.

    Returns:
        Metrics of `evaluate_loss`; None if asked to stop.
    """

    def until_stop(batches: Iterable, total: int) -> Iterator:
        shown = outputs.writer.track(batches, total, f"evaluating after step {step}")
        for number, batch in enumerate(shown):
            outputs.heartbeat(f"validation batch {number} after step {step}")
            if agree(READY) == STOPPING:
                raise _AskedToStop
            sizes = next(iter(batch.values())).shape
            if sizes not in compiled:
                carry = experiment.init_carry(validation[0].batch_size)
                _compile(experiment.eval_steps, (params, carry, batch), agree)
                compiled.add(sizes)
            yield batch

    def until_now(n_rows: int) -> None:
        outputs.heartbeat(f"further evaluations after step {step}")
        if agree(READY) == STOPPING:
            raise _AskedToStop

    compiled: set[tuple[int, ...]] = set()
    config, writer, best = experiment.config, outputs.writer, outputs.best
    last = step == config.train.steps
    n_batches = config.eval.final_batches if last else config.eval.max_batches
    params = state.inference_params
    try:
        with outputs.clock.part("eval"):
            result = evaluate_loss(experiment, params, *validation, n_batches, track=until_stop)
            stores = validation[1]
            result |= losses_by_source(experiment, params, stores, n_batches, track=until_stop)
            further: dict[str, float] = {}
            if config.eval.safety or config.eval.harness:
                from lm.evaluation.beside_validation import further_figures

                print_line, folder = writer.print_line, outputs.workdir / "eval"
                further = further_figures(experiment, params, step, folder, print_line, until_now)
    except _AskedToStop:
        return None
    if best is not None:  # before the metrics, which mark this evaluation as complete
        with outputs.clock.part("checkpoint"):
            best.offer(step, state, result)
    writer.write(step, {f"eval/validation/{name}": x for name, x in result.items()} | further)
    shown = {"loss": ".4f", "perplexity": ".5g", "accuracy": ".4f"}
    figures = (f"{name} {result[name]:{f}}" for name, f in shown.items() if name in result)
    writer.print_line(f"step {step}: validation {', '.join(figures) or 'no targets'}")
    return result


def _compile(function: Wrapped, arguments: tuple, agree: Callable[[int], int]) -> None:
    """Compile a function in a thread, so that a stop request need not wait for it.

    JAX caches the program, so a compiled function returns at once.

    Raises:
        _AskedToStop: a process was asked to stop; the compile thread keeps running.
    """
    problems: list[Exception] = []

    def work() -> None:
        try:
            function.lower(*arguments).compile()
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=work, daemon=True, name=COMPILING)
    thread.start()
    while True:
        thread.join(_POLL_SECONDS)
        state = agree(BUSY if thread.is_alive() else READY)
        if state == STOPPING:
            raise _AskedToStop
        if state == READY:
            break
    if problems:
        raise problems[0]


def summarize(
    clock: Clock,
    step: int,
    finished: bool,
    workdir: Path,
    log: Log,
    figures: Mapping[str, float],
) -> None:
    """Log where the run's time went and where it is stored; print its last evaluation.

    Args:
        clock: clock of the run.
        step: number of updates so far.
        finished: whether that is the last step.
        workdir: local folder of the run.
        log: called with each line.
        figures: last evaluation, printed on stdout if the run is finished.
    """
    summary = clock.summary(step)
    seconds = {name: round(value, 1) for name, value in summary["seconds"].items() if value >= 0.05}
    split = ", ".join(f"{name} {value} s" for name, value in seconds.items())
    starts = summary["starts"]
    log(f"time: {split}; goodput {summary['goodput']:.0%} over {starts} start(s)")
    if not finished:
        log(f"asked to stop: state saved at step {step}; the same command continues")
        return
    log(f"finished {step} steps; run is in {storage_path(workdir)}")
    for name, value in figures.items():
        print(f"validation {name.replace('_', ' ')}: {figure_text(name, value)}")
