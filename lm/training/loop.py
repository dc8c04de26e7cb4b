"""The one training loop: dispatch the next steps, then read the metrics of the last ones."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.accounting.flops import model_flops_per_token, tokens_per_row
from lm.data.batches import prefetch
from lm.data.dataset import Dataset
from lm.errors import UserError
from lm.evaluation.loss import evaluate
from lm.experiment import Experiment
from lm.hardware import peak_flops
from lm.parallel.hosts import CrossHostMax
from lm.runs.checkpoints import Checkpoints
from lm.train_step import Metrics, TrainState
from lm.training.best_checkpoint import BestCheckpoint
from lm.training.clock import Clock
from lm.training.dispatches import dispatches, is_due
from lm.training.metrics import MetricsWriter
from lm.training.preemption import StopRequest
from lm.training.watchdog import Beat

CONTINUE, SAVE, STOP = (
    0,
    1,
    2,
)  # what a process wishes; the largest of all is granted


class InFlight(NamedTuple):
    """Steps that were dispatched and whose metrics have not been read."""

    steps: range
    metrics: Metrics
    requested_action: Any


class Loop:
    """Trains from `first_step` to the end of the configuration's steps, or until asked to stop."""

    def __init__(
        self,
        experiment: Experiment,
        dataset: Dataset,
        state: TrainState,
        first_step: int,
        checkpoints: Checkpoints,
        best: BestCheckpoint,
        writer: MetricsWriter,
        clock: Clock,
        beat: Beat,
    ):
        self.experiment = experiment
        self.config = experiment.config
        self.state = state
        self.step = self._saved_step = first_step
        self.last_evaluation: dict[str, float] = {}
        self._dataset = dataset
        self._validation = (
            experiment.evaluation_batches(dataset.tokenizer, dataset.validation)
            if dataset.validation
            else None
        )
        self._checkpoints, self._best = checkpoints, best
        self._writer, self._clock, self._beat = writer, clock, beat
        self._agreement = CrossHostMax(experiment.mesh.devices.flatten().tolist())
        self._in_flight: deque[InFlight] = deque()
        self._programs: dict[int, Any] = {}
        self._skipped_step: int | None = None
        self._read_at = self._saved_at = time.monotonic()
        devices = experiment.mesh.devices.flatten()
        self._tokens_per_row = tokens_per_row(experiment)
        self._flops_per_token = model_flops_per_token(experiment)
        self._peak = peak_flops(devices[0])
        self._n_devices = len(devices)

    def run(self, stop: StopRequest) -> bool:
        """Train; true if the last step was reached, false if stopped early with a saved state."""
        config = self.config
        if self._at_stop:
            return False
        batches = prefetch(
            self.experiment.train_batches(self._dataset),
            dispatches(self.step, config),
            self.experiment.batch_sharding,
            config.data.prefetch,
        )
        for steps in dispatches(self.step, config):
            self._beat(f"step {self.step}")
            with self._clock.part("data"):
                batch = next(batches)
            program = self._program(batch, len(steps))
            with self._clock.part("step"), jax.transfer_guard("disallow"):
                self.state, metrics = program(self.state, batch)
            self._in_flight.append(InFlight(steps, metrics, self._requested_action(stop)))
            self.step = steps.stop
            requested_action = STOP if self._at_stop else self._read_metrics(leave=1)
            last = self.step == config.train.steps
            due_eval = last or is_due(self.step, config.eval.every_steps)
            due_save = (
                last or is_due(self.step, config.checkpoint.every_steps) or requested_action == SAVE
            )
            if due_eval or due_save or requested_action == STOP or self._must_halt:
                requested_action = max(requested_action, self._read_metrics(leave=0))
            if self._must_halt:
                self._halt()
            if due_eval:
                self._evaluate(config.eval.final_batches if last else config.eval.max_batches)
            if due_save or requested_action == STOP:
                self._save()
            if requested_action == STOP and not last:
                batches.close()
                return False
        return True

    @property
    def _at_stop(self) -> bool:
        return 0 < self.config.train.stop_at <= self.step < self.config.train.steps

    def _requested_action(self, stop: StopRequest) -> Any:
        period = self.config.checkpoint.every_seconds
        overdue = period and time.monotonic() - self._saved_at > period
        return self._agreement.propose(STOP if stop else SAVE if overdue else CONTINUE)

    def _program(self, batch: Any, n_steps: int) -> Any:
        """The compiled program for this many steps."""
        if n_steps not in self._programs:
            with self._clock.part("compile"):
                lowered = self.experiment.train_steps.lower(self.state, batch)
                self._programs[n_steps] = lowered.compile()
            self._read_at = time.monotonic()
        return self._programs[n_steps]

    def _read_metrics(self, leave: int) -> int:
        """Wait for all but the last `leave` dispatches, write their metrics; return the action."""
        action = CONTINUE
        while len(self._in_flight) > leave:
            done = self._in_flight.popleft()
            with self._clock.part("step"):
                metrics = jax.device_get(done.metrics)
                action = max(action, self._agreement.decided(done.requested_action))
            self._beat(f"step {done.steps.stop}")
            now = time.monotonic()
            speed = self._speed(len(done.steps), now - self._read_at)
            self._read_at = now
            for i, step in enumerate(done.steps):
                values = {name: float(np.float64(column[i])) for name, column in metrics.items()}
                if values["skipped"] and self._skipped_step is None:
                    self._skipped_step = step + 1
                written = is_due(step + 1, self.config.log.every_steps)
                self._writer.step(step + 1, values | speed, written)
            self._writer.flush()
        self._checkpoints.check()
        return action

    def _speed(self, n_steps: int, seconds: float) -> dict[str, float]:
        tokens = n_steps * self.config.data.batch_size * self._tokens_per_row
        flops = self._flops_per_token * tokens / max(seconds, 1e-9) / self._n_devices
        speed = {
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "seconds_per_step": seconds / n_steps,
            "model_tflops_per_device": flops / 1e12,
        }
        return speed | ({"mfu": flops / self._peak} if self._peak else {})

    @property
    def _must_halt(self) -> bool:
        return self._skipped_step is not None and self.config.train.nonfinite == "halt"

    def _halt(self) -> None:
        self._save()
        self._checkpoints.close()
        raise UserError(
            f"loss or gradient is not finite at step {self._skipped_step}; that update was left "
            f"out and the state saved at step {self.step}. Lower the learning rate, or continue "
            "with --config.train.nonfinite=skip"
        )

    def _evaluate(self, max_batches: int) -> None:
        if self._validation is None:
            return
        with self._clock.part("eval"):
            result = evaluate(
                self.experiment,
                self.state.params,
                self._validation,
                self._dataset.validation,
                max_batches,
                track=self._watched,
            )
        self.last_evaluation = result
        values = {f"eval/validation/{name}": value for name, value in result.items()}
        self._writer.write(self.step, values)
        shown = ("loss", "perplexity", "accuracy")
        figures = (f"{name} {result[name]:.4f}" for name in shown if name in result)
        self._writer.say(f"step {self.step}: validation {', '.join(figures)}")
        with self._clock.part("checkpoint"):
            self._best.offer(self.step, self.state, result)
        self._read_at = time.monotonic()

    def _watched(self, batches: Iterable, total: int) -> Iterator:
        for number, batch in enumerate(batches):
            self._beat(f"validation batch {number} after step {self.step}")
            yield batch

    def _save(self) -> None:
        if self.step != self._saved_step:
            with self._clock.part("checkpoint"):
                self._writer.sync()
                self._checkpoints.save(self.step, self.state)
        self._clock.save(self.step)
        self._saved_step, self._saved_at = self.step, time.monotonic()
        self._read_at = time.monotonic()
