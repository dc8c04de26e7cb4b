"""Which steps each call of the compiled program runs: a function of the configuration alone."""

from __future__ import annotations

from collections.abc import Iterator

from ml_collections import ConfigDict


def dispatches(first_step: int, config: ConfigDict) -> Iterator[range]:
    """Ranges of steps from `first_step` to the end.

    They end at every multiple of `train.steps_per_dispatch`, and wherever an evaluation or a
    checkpoint is due, so that a run that was cut and resumed repeats the same calls.
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
    """Whether something that happens every `period` steps (0: never) happens after `step`."""
    return period > 0 and step % period == 0
