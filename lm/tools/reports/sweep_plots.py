"""In what the runs of a sweep differ, and what that did to a metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm.tools.reports.run_records import TRAIN_LOSS, VALIDATION_LOSS, Run


def swept_keys(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """The keys that differ between runs; those that always change together are one group."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.config):
        values = [repr(run.config.get(key)) for run in runs]
        pattern = tuple(values.index(value) for value in values)
        if any(pattern):
            groups.setdefault(pattern, []).append(key)
    return [tuple(keys) for keys in groups.values()]


def final_metric(runs: Sequence[Run]) -> str:
    """What runs are compared by: validation loss if any has one, else the training loss."""
    evaluated = any(VALIDATION_LOSS in run.curves for run in runs)
    return VALIDATION_LOSS if evaluated else TRAIN_LOSS


def best(runs: Sequence[Run]) -> Run | None:
    """The run with the lowest final metric."""
    metric = final_metric(runs)
    scored = [(value, i) for i, run in enumerate(runs) if (value := run.final(metric)) is not None]
    return runs[min(scored)[1]] if scored else None


def lines_of(
    runs: Sequence[Run], key: str, others: Sequence[str]
) -> dict[tuple[Any, ...], list[Run]]:
    """The runs that agree in all of `others`, by these values, each list in the order of `key`."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in sorted(runs, key=lambda run: _order(run.config.get(key))):
        found.setdefault(tuple(_hashable(run.config.get(o)) for o in others), []).append(run)
    return dict(sorted(found.items(), key=lambda item: [_order(value) for value in item[0]]))


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return (not number, value if number else 0.0, str(value))


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
