"""Prometheus metrics of a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from lm.serving.served_models import ServedModel
from lm.serving.work_queue import WorkQueue

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Metrics:
    """Counters and histograms of requests, and statistics of the engines."""

    def __init__(self, queues: Mapping[ServedModel, WorkQueue]):
        self.registry = CollectorRegistry()
        names: Any = {"registry": self.registry, "namespace": "lm"}
        self._requests = Counter(
            "requests", "Requests by path and HTTP status.", ["path", "status"], **names
        )
        self._active = Gauge("active_requests", "Requests in progress.", **names)
        times = names | {"buckets": _SECONDS, "labelnames": ["model"]}
        self._seconds = Histogram("request_seconds", "Duration of a request.", **times)
        self._first = Histogram("first_token_seconds", "Time to the first token.", **times)
        self._between = Histogram("between_tokens_seconds", "Mean time between tokens.", **times)
        self.registry.register(_Engines(queues))

    def begin(self) -> None:
        """Count the start of a request."""
        self._active.inc()

    def end(self, path: str, status: int, model: str, seconds: float) -> None:
        """Count the end of a request.

        Args:
            path: its path, one of the server's.
            status: HTTP status.
            model: requested model; "": none.
            seconds: duration.
        """
        self._active.dec()
        self._requests.labels(path, status).inc()
        if model:
            self._seconds.labels(model).observe(seconds)

    def timer(self, model: str, started: float) -> TokenTimer:
        """Return the timer of a reply requested at `started`."""
        return TokenTimer(self._first.labels(model), self._between.labels(model), started)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class TokenTimer:
    """Time between the tokens of a reply; tokens that arrive together share it."""

    def __init__(self, first: Histogram, between: Histogram, started: float):
        self._first, self._between, self._started = first, between, started
        self._last: dict[int, float] = {}

    def tick(self, index: int, n: int) -> None:
        """Record `n` new tokens of reply `index`."""
        if not n:
            return
        now = time.monotonic()
        if index not in self._last:
            self._first.observe(now - self._started)
        else:
            for _ in range(n):
                self._between.observe((now - self._last[index]) / n)
        self._last[index] = now


class _Engines(Collector):
    """Statistics of the engines, read when the metrics are collected."""

    def __init__(self, queues: Mapping[ServedModel, WorkQueue]):
        self._queues = queues

    def describe(self) -> Iterable[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        engines = [(model.name, model.engine) for model in self._queues if model.engine]
        read: list[tuple[type, str, str, Callable[[Any], float]]] = [
            (GaugeMetricFamily, "running", "Replies being generated.", _of("n_running")),
            (GaugeMetricFamily, "rows", "Maximum concurrent replies.", _of("n_rows")),
            (GaugeMetricFamily, "cache_pages", "Pages of the KV cache.", _of("n_pages")),
            (
                GaugeMetricFamily,
                "cache_pages_used",
                "Pages held by running requests.",
                _of("n_pages_used"),
            ),
            (CounterMetricFamily, "prompt_tokens", "Prompt tokens.", _of("n_prompt_tokens")),
            (
                CounterMetricFamily,
                "reused_tokens",
                "Prompt tokens found in the cache.",
                _of("n_reused_tokens"),
            ),
            (CounterMetricFamily, "new_tokens", "Generated tokens.", _of("n_new_tokens")),
        ]
        waiting = "Waiting replies and groups of texts."
        queued = GaugeMetricFamily("lm_queued", waiting, labels=["model"])
        for model, queue in self._queues.items():
            n_running = model.engine.statistics.n_running if model.engine else 0
            queued.add_metric([model.name], max(0, queue.n - n_running))
        yield queued
        step = GaugeMetricFamily("lm_step", "Training step of the weights.", labels=["model"])
        for model in self._queues:
            step.add_metric([model.name], model.step)
        yield step
        for family, metric, about, value in read:
            found = family(f"lm_{metric}", about, labels=["model"])
            for name, engine in engines:
                found.add_metric([name], value(engine.statistics))
            yield found


def _of(name: str) -> Callable[[Any], float]:
    return lambda statistics: getattr(statistics, name)
