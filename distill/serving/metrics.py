"""Counters for Prometheus."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distill.serving.gate import Gate

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class RequestMetrics:
    """Requests of one service, by route."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("distill_requests", "Requests answered.", ["route", "status"], registry=self.registry)
        self._errors = Counter(
            "distill_errors", "Requests answered with status 4xx or 5xx.", ["route", "kind"], registry=self.registry
        )
        self._latency = Histogram(
            "distill_request_seconds",
            "Time from a request's first byte to its answer's last.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)
        if status >= 400:
            self._errors.labels(route, "server" if status >= 500 else "client").inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class Metrics(RequestMetrics):
    """Of the student's service."""

    def __init__(self, gates: Mapping[str, Gate]) -> None:
        """``gates``: whose waiting requests are shown."""
        super().__init__()
        self._parts = Histogram(
            "distill_part_seconds",
            "Time of a part: preprocess, embed, search or rerank.",
            ["part"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        inside = Gauge(
            "distill_inside", "Requests that a gate works on or lets wait.", ["gate"], registry=self.registry
        )
        for name, gate in gates.items():
            inside.labels(name).set_function(partial(getattr, gate, "taken"))

    def parts(self, milliseconds: Mapping[str, float]) -> None:
        """Note the times of an answer's parts."""
        for part, value in milliseconds.items():
            self._parts.labels(part).observe(value / 1000)
