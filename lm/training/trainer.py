"""Training of a run: from a configuration and a workdir to a trained model.

`train` builds or restores the run; `Loop` dispatches steps asynchronously, reading the metrics of
earlier steps after dispatching later ones.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lm.accounting.flops import model_flops_per_token, peak_flops, tokens_per_row
from lm.data.batches import prefetch
from lm.data.dataset import Dataset
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.experiment import Experiment, build_with_data, check
from lm.models.variables import flat
from lm.parallel.mesh import LENGTH_AXIS, is_primary_host, on_all_hosts
from lm.runs.checkpoints import (
    Checkpoints,
    Log,
    disk_errors,
    ignore_line,
    prepare_workdir,
    run_metadata,
)
from lm.runs.workdir import first_row, require_no_lost_steps, set_lost_run_aside
from lm.storage import AnyPath, open_run_folder, resolve_path, run_lock, storage_path
from lm.train_step import Metrics, TrainState
from lm.training.monitor import Clock, MetricsWriter, StopRequest, watchdog
from lm.training.results import STOPPING, BestCheckpoint, Outputs, evaluate_state, summarize

CONTINUE, SAVE, STOP = range(3)  # requested actions; all processes take the maximum


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    log: Log = ignore_line,
    progress: bool = False,
    restart: bool = False,
    change: bool = False,
    fork: str | None = None,
    stop: StopRequest | None = None,
) -> bool:
    """Train the run in `workdir`, or resume it.

    Args:
        config: configuration, resolved or not.
        workdir: folder of the run, created if missing.
        log: called with lines for the user.
        progress: show progress bars on stderr, and the last evaluation on stdout.
        restart: begin at step 0 if a run has lost all its checkpoints; its files move to the folder
            restarted.N in `workdir`.
        change: resume the run in `workdir` from its newest checkpoint with another configuration;
            the differences are recorded in run.json.
        fork: RUN or RUN@STEP: start a new run from this checkpoint of another one, with its
            parameters, optimizer state, data position and step; differences are recorded.
        stop: stop request, polled during training; None: created from signals.

    Returns:
        Whether the last step was reached; False if the run was asked to stop and can be resumed.

    Raises:
        UserError: configuration, data and workdir do not match.
    """
    with ExitStack() as stack:
        if stop is None:
            from lm.training.stop_signals import stop_requests

            stop = stack.enter_context(stop_requests())
        if jax.process_count() > 1:
            from lm.parallel.agreement import require_same_start

            check(config, jax.devices()[0].platform, len(jax.devices()))
            require_same_start(config)
        stack.enter_context(_only_run(resolve_path(str(workdir))))
        workdir = open_run_folder(str(workdir))
        stack.enter_context(disk_errors(storage_path(workdir)))
        experiment, dataset = build_with_data(
            config, jax.devices(), progress=progress and is_primary_host()
        )
        metadata = _open_run(experiment, dataset, workdir, config, restart, change, fork, log)
        config = experiment.config
        log(describe(experiment))
        data, n_tokens = config.data, sum(store.n_tokens for store in dataset.train)
        few = n_tokens <= data.batch_size * (data.sequence_length + data.target_length)
        if few or not experiment.steps.schedule(config.train.steps - 1):
            from lm.training.diagnosis import likely_mistakes

            for line in likely_mistakes(experiment, dataset.train):
                log(f"note: {line}")
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint, metadata)
        state, first_row = _restore(experiment, dataset.tokenizer, workdir, checkpoints, log)
        first_step = int(jax.device_get(state.step))
        if experiment.objective.precomputes:
            from lm.training.precomputed import precompute

            experiment = precompute(experiment, dataset, state, workdir, log)
        clock = Clock(workdir / "clock.json", first_step, config.log.every_steps)
        writer = MetricsWriter(
            workdir, first_step, config, log_periods=clock.log_periods, progress=progress
        )
        best = BestCheckpoint(workdir, config, checkpoints.metadata) if config.eval.best else None
        try:
            with watchdog(config.train.stall_seconds, storage_path(workdir)) as heartbeat:
                outputs = Outputs(checkpoints, best, writer, clock, heartbeat, workdir)
                loop = Loop(experiment, dataset, state, first_step, outputs, stop, first_row)
                if config.train.profile:
                    from lm.training.profiling import profile

                    stack.enter_context(profile(loop, config.train.profile, workdir, log))
                finished = loop.run()
                with clock.part("checkpoint"):
                    checkpoints.close()
                    if best is not None:
                        best.close()
        finally:
            writer.close()
        if is_primary_host():
            clock.save(loop.step)
            figures = loop.last_evaluation if progress else {}
            summarize(clock, loop.step, finished, workdir, log, figures)
        return finished


def _open_run(
    experiment: Experiment,
    dataset: Dataset,
    workdir: Path,
    given: ConfigDict,
    restart: bool,
    change: bool,
    fork: str | None,
    log: Log,
) -> dict[str, Any]:
    """Prepare the workdir for this start; return the metadata of the run.

    `given` is the configuration before it was resolved; for other arguments see `train`.
    """
    config = experiment.config
    if config.eval.best or config.eval.harness or config.eval.safety:
        from lm.evaluation.beside_validation import require_tasks

        require_tasks(experiment, dataset)
    if restart:
        set_lost_run_aside(workdir)
    metadata = run_metadata(config, dataset.fingerprint, given)
    recorded = None
    if change or fork is not None:
        from lm.runs.changes import change_of

        recorded = change_of(experiment, workdir, metadata, change, fork, log)
    return prepare_workdir(workdir, metadata, dataset, recorded)


@contextmanager
def _only_run(workdir: AnyPath) -> Iterator[None]:
    """Lock the workdir on the primary host; all hosts raise if another run holds the lock."""
    problem = ""
    with ExitStack() as held:
        if is_primary_host():
            try:
                held.enter_context(run_lock(workdir))
            except UserError as error:
                problem = str(error)
        if not on_all_hosts(not problem):
            raise UserError(problem or f"process 0 cannot use --workdir {workdir}; see its message")
        yield


def _restore(
    experiment: Experiment, tokenizer: Tokenizer, workdir: Path, checkpoints: Checkpoints, log: Log
) -> tuple[TrainState, int]:
    """Return the newest checkpoint's state, or an initial one, and the `first_row` of batches."""
    state = checkpoints.restore(experiment.state_shapes, experiment.state_sharding, log)
    if state is None:
        if storage_path(workdir / "damaged").exists():
            require_no_lost_steps(workdir)
        options = experiment.config.init
        if options["from"] or options.vectors or experiment.objective.frozen:
            from lm.training.warm_start import initial_state

            state = initial_state(experiment, tokenizer, log)
        else:
            state = experiment.init_state()
    first_step = int(jax.device_get(state.step))
    if first_step:
        log(f"continuing from step {first_step}")
    if "history" not in checkpoints.metadata:
        return state, 0
    from lm.runs.changes import settle

    checkpoints.metadata = settle(workdir, checkpoints.metadata, first_step)
    return state, first_row(checkpoints.metadata)


def describe(experiment: Experiment) -> str:
    """Return the lines printed before training.

    They give model size, devices, mesh, dtype, attention kernel, pipeline schedule, and the
    parameter dimensions that are replicated because the mesh does not divide them.
    """
    config, mesh = experiment.config, experiment.mesh
    shapes = flat(experiment.param_shapes)
    n_params = sum(leaf.size for leaf in shapes.values())
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    devices = mesh.devices.flatten()
    lines = [
        f"{config.model.family} of {n_params:,} parameters on {mesh.size} "
        f"{devices[0].device_kind} ({axes or 'one device'}), {jax.process_count()} process(es); "
        f"{config.model.dtype}, {_attention(experiment)}"
    ]
    if mesh.size > 1:
        from lm.parallel.mesh_rules import mesh_notes

        infos = experiment.param_infos
        parameters = {path: (infos[path].axes, leaf.shape) for path, leaf in shapes.items()}
        lines += mesh_notes(mesh, experiment.pipeline, parameters)
    return "\n".join(lines)


def _attention(experiment: Experiment) -> str:
    attention = experiment.attention
    n_shards = experiment.mesh.shape[LENGTH_AXIS]
    across = f", {attention.across} over {n_shards} sequence shards" if n_shards > 1 else ""
    return f"attention kernel {attention.kernel} ({attention.why}){across}"


class InFlight(NamedTuple):
    """Dispatched steps whose metrics have not been read yet."""

    steps: range
    size: int  # elements per batch
    metrics: Metrics
    action: Any


class Loop:
    """Training loop from a state to the last step, or until asked to stop.

    Attributes:
        state: newest state.
        step: steps dispatched so far.
        dispatches: ranges of steps to dispatch.
        last_evaluation: metrics of the last evaluation.
    """

    def __init__(
        self,
        experiment: Experiment,
        dataset: Dataset,
        state: TrainState,
        first_step: int,
        outputs: Outputs,
        stop: StopRequest,
        first_row: int = 0,
    ):
        """Prepare a loop that continues `state` at `first_step`, until `stop` is requested.

        See `Batches` for `first_row`.
        """
        self.experiment = experiment
        self.config = experiment.config
        self.state = state
        self.step = self._saved_step = first_step
        self.dispatches: Iterable[range] = dispatches(first_step, experiment.config)
        self.last_evaluation: dict[str, float] = {}
        self._dataset = dataset
        self._first_row = first_row
        self._outputs, self._clock = outputs, outputs.clock
        self._stop, stop.nothing_to_save = stop, self._is_saved
        self._validation = (
            experiment.evaluation_batches(dataset.validation) if dataset.validation else None
        )
        devices = experiment.mesh.devices.flatten()
        self._start_max: Callable[[int], Any] = int
        self._max: Callable[[Any], int] = int
        if jax.process_count() > 1:
            from lm.parallel.agreement import CrossHostMax

            over_processes = CrossHostMax(devices.tolist())
            self._start_max, self._max = over_processes.start, over_processes.result
        self._in_flight: deque[InFlight] = deque()
        self._programs: dict[tuple, Any] = {}
        self._first_skipped: tuple[int, dict[str, float]] | None = None
        self._read_at = self._saved_at = time.monotonic()
        self._tokens_per_row = tokens_per_row(experiment)
        self._row_size = sum(prod(shape) for shape, _ in experiment.objective.shapes.values())
        self._flops_per_token = model_flops_per_token(experiment)
        self._peak_flops = peak_flops(devices[0])
        self._n_devices = len(devices)
        self._epochs: Callable[[int], dict[str, float]] = lambda step: {}
        if len(dataset.train) > 1:
            from lm.data.mixture import epochs_by_step

            parts = experiment.training_parts(dataset)
            self._epochs = epochs_by_step(parts, dataset, self.config.data, first_row)

    def run(self) -> bool:
        """Train to the last step.

        A step that is due for both is saved first, then evaluated; if the process stops in between,
         the next start evaluates it.

        Returns:
            Whether the last step was reached; otherwise the run stopped early with its state saved.
        """
        config = self.config
        lost = self._clock.continues and not self._outputs.writer.has_evaluation
        missing = self._start_max(lost)
        due = self.step and self._is_due_for_evaluation and self._max(missing)
        if (due and not self._evaluate()) or self._reached_stop_at:
            return False
        rows = self.experiment.train_batches(self._dataset, self._first_row)
        if config.data.batch_ramp or config.data.length_ramp:
            from lm.training.ramped_batches import ramped

            rows = ramped(self.experiment, rows)
        batches = prefetch(
            rows,
            dispatches(self.step, config),
            self.experiment.batch_sharding,
            config.data.prefetch,
        )
        with closing(batches):
            return self._run(batches)

    def _run(self, batches: Iterator[dict[str, jax.Array]]) -> bool:
        config = self.config
        for steps in self.dispatches:
            self._outputs.heartbeat(f"step {self.step}")
            with self._clock.part("data"):
                batch = next(batches)
            program = self._program(batch)
            with self._clock.part("step"), jax.transfer_guard("disallow"):
                self.state, metrics = program(self.state, batch)
            size = sum(x.size for x in batch.values())
            self._in_flight.append(InFlight(steps, size, metrics, self._request_action()))
            self.step = steps.stop
            action = STOP if self._reached_stop_at else self._read_metrics(leave=1)
            last = self.step == config.train.steps
            due_eval = self._is_due_for_evaluation
            due_save = last or is_due(self.step, config.checkpoint.every_steps) or action == SAVE
            if due_eval or due_save or action == STOP or self._must_halt:
                action = max(action, self._read_metrics(leave=0))
            if self._must_halt:
                self._halt()
            if due_save or action == STOP:
                self._save()
            if due_eval and not self._evaluate():
                self._save()
                return False
            if action == STOP and not last:
                return False
        return True

    @property
    def _reached_stop_at(self) -> bool:
        return 0 < self.config.train.stop_at <= self.step < self.config.train.steps

    @property
    def _is_due_for_evaluation(self) -> bool:
        config = self.config
        return self.step == config.train.steps or is_due(self.step, config.eval.every_steps)

    def _is_saved(self) -> bool:
        return self.step == self._saved_step and not self._outputs.checkpoints.is_saving

    def _request_action(self) -> Any:
        period = self.config.checkpoint.every_seconds
        overdue = period and time.monotonic() - self._saved_at > period
        return self._start_max(STOP if self._stop else SAVE if overdue else CONTINUE)

    def _program(self, batch: Any) -> Any:
        """Compile the training program for these batch shapes, or return the cached one."""
        shapes = tuple(x.shape for x in batch.values())
        if shapes not in self._programs:
            with self._clock.part("compile"):
                lowered = self.experiment.train_steps.lower(self.state, batch)
                self._programs[shapes] = lowered.compile()
            self._read_at = time.monotonic()
        return self._programs[shapes]

    def _read_metrics(self, leave: int) -> int:
        """Wait for all but the last `leave` dispatches and log their metrics.

        Returns:
            Largest action that any process requested with them.
        """
        action = CONTINUE
        while len(self._in_flight) > leave:
            done = self._in_flight.popleft()
            with self._clock.part("step"):
                metrics = jax.device_get(done.metrics)
                action = max(action, self._max(done.action))
            self._outputs.heartbeat(f"step {done.steps.stop}")
            now = time.monotonic()
            speed = self._speed(done, now - self._read_at)
            self._read_at = now
            for i, step in enumerate(done.steps):
                values = {name: float(np.float64(column[i])) for name, column in metrics.items()}
                if values["skipped"]:
                    self._first_skipped = self._first_skipped or (step + 1, values)
                elif step == 0 and not values["grad_norm"] * values["learning_rate"]:
                    self._require_learning(values)
                written = is_due(step + 1, self.config.log.every_steps)
                values |= speed | self._epochs(step + 1)
                self._outputs.writer.step(step + 1, values, written)
            self._outputs.writer.flush()
        self._outputs.checkpoints.check()
        return action

    def _speed(self, done: InFlight, seconds: float) -> dict[str, float]:
        tokens = done.size / self._row_size * self._tokens_per_row
        flops = self._flops_per_token * tokens / max(seconds, 1e-9) / self._n_devices
        speed = {
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "seconds_per_step": seconds / len(done.steps),
            "model_tflops_per_device": flops / 1e12,
        }
        return speed | ({"mfu": flops / self._peak_flops} if self._peak_flops else {})

    @property
    def _must_halt(self) -> bool:
        return self._first_skipped is not None and self.config.train.nonfinite == "halt"

    def _halt(self) -> None:
        self._save()
        self._outputs.checkpoints.close()
        from lm.training.diagnosis import nonfinite_message

        assert self._first_skipped is not None
        decay = self.config.optimizer.weight_decay
        params = self.state.params
        raise UserError(nonfinite_message(*self._first_skipped, params, decay, self.step))

    def _require_learning(self, values: dict[str, float]) -> None:
        from lm.training.diagnosis import require_learning

        batches = self.experiment.train_batches(self._dataset)
        require_learning(values, self.experiment, self.state.inference_params, batches)

    def _evaluate(self) -> bool:
        """Evaluate the validation data, if any; return False if asked to stop."""
        if self._validation is None:
            return True
        result = evaluate_state(
            self.experiment,
            self.state,
            self.step,
            (self._validation, self._dataset.validation),
            self._outputs,
            lambda busy: self._max(self._start_max(STOPPING if self._stop else busy)),
        )
        self.last_evaluation = result or self.last_evaluation
        self._read_at = time.monotonic()
        return result is not None

    def _save(self) -> None:
        if self.step != self._saved_step:
            with self._clock.part("checkpoint"):
                self._outputs.writer.sync()
                self._outputs.checkpoints.save(self.step, self.state)
        self._clock.save(self.step)
        self._saved_step = self.step
        self._saved_at = self._read_at = time.monotonic()


def dispatches(first_step: int, config: ConfigDict) -> Iterator[range]:
    """Yield the range of steps of each call of the compiled program.

    A range ends at every multiple of `train.steps_per_dispatch` and at every step with an
    evaluation or checkpoint, so that a resumed run makes the same calls as an uninterrupted one.
    """
    periods = [
        period
        for period in (
            config.train.steps_per_dispatch,
            config.eval.every_steps,
            config.checkpoint.every_steps,
        )
        if period
    ]
    start = first_step
    while start < config.train.steps:
        stop = min(config.train.steps, *(start - start % period + period for period in periods))
        yield range(start, stop)
        start = stop


def is_due(step: int, period: int) -> bool:
    """Return whether an action with this period (0: never) is due after `step`."""
    return period > 0 and step % period == 0
