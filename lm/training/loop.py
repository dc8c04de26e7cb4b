"""Training loop: dispatch the next steps, then read the metrics of the previous ones."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lm.accounting.flops import model_flops_per_token, peak_flops, tokens_per_row
from lm.data.batches import prefetch
from lm.data.dataset import Dataset
from lm.errors import UserError
from lm.evaluation.loss import evaluate_loss
from lm.experiment import Experiment
from lm.parallel.mesh import CrossHostMax
from lm.runs.checkpoints import Checkpoints
from lm.train_step import Metrics, TrainState
from lm.training.monitor import Clock, Heartbeat, MetricsWriter, StopRequest

CONTINUE, SAVE, STOP = range(3)  # requested actions; the largest over all processes is taken


class InFlight(NamedTuple):
    """Dispatched steps whose metrics have not been read."""

    steps: range
    metrics: Metrics
    action: Any


@dataclass(frozen=True)
class Outputs:
    """Destinations of what a run produces.

    Attributes:
        checkpoints: checkpoints of the run.
        best: checkpoint kept by `--config.eval.best` (lm/training/best_checkpoint.py), or None.
        writer: metrics.jsonl, TensorBoard and progress bar.
        clock: wall time by part.
        heartbeat: called whenever the run makes progress.
    """

    checkpoints: Checkpoints
    best: Any
    writer: MetricsWriter
    clock: Clock
    heartbeat: Heartbeat


class Loop:
    """Training loop from a state to the last step, or until it is asked to stop."""

    def __init__(
        self,
        experiment: Experiment,
        dataset: Dataset,
        state: TrainState,
        first_step: int,
        outputs: Outputs,
    ):
        """Prepare a loop that continues `state` at `first_step`."""
        self.experiment = experiment
        self.config = experiment.config
        self.state = state
        self.step = self._saved_step = first_step
        self.last_evaluation: dict[str, float] = {}
        self._dataset = dataset
        self._outputs, self._clock = outputs, outputs.clock
        self._validation = (
            experiment.evaluation_batches(dataset.validation) if dataset.validation else None
        )
        devices = experiment.mesh.devices.flatten()
        self._action_max = CrossHostMax(devices.tolist())
        self._in_flight: deque[InFlight] = deque()
        self._programs: dict[int, Any] = {}
        self._first_skipped_step: int | None = None
        self._read_at = self._saved_at = time.monotonic()
        self._tokens_per_row = tokens_per_row(experiment)
        self._flops_per_token = model_flops_per_token(experiment)
        self._peak_flops = peak_flops(devices[0])
        self._n_devices = len(devices)

    def run(self, stop: StopRequest) -> bool:
        """Train to the last step.

        Returns:
            Whether the last step was reached; otherwise the run stopped early with a saved state.
        """
        config = self.config
        if self._reached_stop_at:
            return False
        batches = prefetch(
            self.experiment.train_batches(self._dataset),
            dispatches(self.step, config),
            self.experiment.batch_sharding,
            config.data.prefetch,
        )
        for steps in dispatches(self.step, config):
            self._outputs.heartbeat(f"step {self.step}")
            with self._clock.part("data"):
                batch = next(batches)
            program = self._program(batch, len(steps))
            with self._clock.part("step"), jax.transfer_guard("disallow"):
                self.state, metrics = program(self.state, batch)
            self._in_flight.append(InFlight(steps, metrics, self._request_action(stop)))
            self.step = steps.stop
            action = STOP if self._reached_stop_at else self._read_metrics(leave=1)
            last = self.step == config.train.steps
            due_eval = last or is_due(self.step, config.eval.every_steps)
            due_save = last or is_due(self.step, config.checkpoint.every_steps) or action == SAVE
            if due_eval or due_save or action == STOP or self._must_halt:
                action = max(action, self._read_metrics(leave=0))
            if self._must_halt:
                self._halt()
            if due_eval:
                self._evaluate(config.eval.final_batches if last else config.eval.max_batches)
            if due_save or action == STOP:
                self._save()
            if action == STOP and not last:
                batches.close()
                return False
        return True

    @property
    def _reached_stop_at(self) -> bool:
        return 0 < self.config.train.stop_at <= self.step < self.config.train.steps

    def _request_action(self, stop: StopRequest) -> Any:
        period = self.config.checkpoint.every_seconds
        overdue = period and time.monotonic() - self._saved_at > period
        return self._action_max.start(STOP if stop else SAVE if overdue else CONTINUE)

    def _program(self, batch: Any, n_steps: int) -> Any:
        """Return the compiled program for this number of steps."""
        if n_steps not in self._programs:
            with self._clock.part("compile"):
                lowered = self.experiment.train_steps.lower(self.state, batch)
                self._programs[n_steps] = lowered.compile()
            self._read_at = time.monotonic()
        return self._programs[n_steps]

    def _read_metrics(self, leave: int) -> int:
        """Wait for all but the last `leave` dispatches and write their metrics.

        Returns:
            The largest action that any process requested with them.
        """
        action = CONTINUE
        while len(self._in_flight) > leave:
            done = self._in_flight.popleft()
            with self._clock.part("step"):
                metrics = jax.device_get(done.metrics)
                action = max(action, self._action_max.result(done.action))
            self._outputs.heartbeat(f"step {done.steps.stop}")
            now = time.monotonic()
            speed = self._speed(len(done.steps), now - self._read_at)
            self._read_at = now
            for i, step in enumerate(done.steps):
                values = {name: float(np.float64(column[i])) for name, column in metrics.items()}
                if values["skipped"] and self._first_skipped_step is None:
                    self._first_skipped_step = step + 1
                written = is_due(step + 1, self.config.log.every_steps)
                self._outputs.writer.step(step + 1, values | speed, written)
            self._outputs.writer.flush()
        self._outputs.checkpoints.check()
        return action

    def _speed(self, n_steps: int, seconds: float) -> dict[str, float]:
        tokens = n_steps * self.config.data.batch_size * self._tokens_per_row
        flops = self._flops_per_token * tokens / max(seconds, 1e-9) / self._n_devices
        speed = {
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "seconds_per_step": seconds / n_steps,
            "model_tflops_per_device": flops / 1e12,
        }
        return speed | ({"mfu": flops / self._peak_flops} if self._peak_flops else {})

    @property
    def _must_halt(self) -> bool:
        return self._first_skipped_step is not None and self.config.train.nonfinite == "halt"

    def _halt(self) -> None:
        self._save()
        self._outputs.checkpoints.close()
        raise UserError(
            f"loss or gradient is not finite at step {self._first_skipped_step}; that update was "
            f"left out and the state saved at step {self.step}. Lower the learning rate, or "
            "continue with --config.train.nonfinite=skip"
        )

    def _evaluate(self, max_batches: int) -> None:
        if self._validation is None:
            return
        with self._clock.part("eval"):
            result = evaluate_loss(
                self.experiment,
                self.state.inference_params,
                self._validation,
                self._dataset.validation,
                max_batches,
                track=self._with_heartbeat,
            )
        self.last_evaluation = result
        writer, best = self._outputs.writer, self._outputs.best
        writer.write(self.step, {f"eval/validation/{name}": x for name, x in result.items()})
        shown = ("loss", "perplexity", "accuracy")
        figures = (f"{name} {result[name]:.4f}" for name in shown if name in result)
        writer.print_line(f"step {self.step}: validation {', '.join(figures)}")
        if best is not None:
            with self._clock.part("checkpoint"):
                best.offer(self.step, self.state, result)
        self._read_at = time.monotonic()

    def _with_heartbeat(self, batches: Iterable, total: int) -> Iterator:
        for number, batch in enumerate(batches):
            self._outputs.heartbeat(f"validation batch {number} after step {self.step}")
            yield batch

    def _save(self) -> None:
        if self.step != self._saved_step:
            with self._clock.part("checkpoint"):
                self._outputs.writer.sync()
                self._outputs.checkpoints.save(self.step, self.state)
        self._clock.save(self.step)
        self._saved_step = self.step
        self._saved_at = self._read_at = time.monotonic()


def dispatches(first_step: int, config: ConfigDict) -> Iterator[range]:
    """Yield the ranges of steps that each call of the compiled program runs.

    A range ends at every multiple of `train.steps_per_dispatch` and wherever an evaluation or a
    checkpoint is due, so that a resumed run repeats the calls of an uninterrupted one.
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
