"""Counters for Prometheus: what the engine did, beside the requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from distill.serving.metrics import RequestMetrics

if TYPE_CHECKING:
    from distill.teacher_service.engine import Engine


class TeacherMetrics(RequestMetrics):
    """Of the teacher's service."""

    def __init__(self, engine: Engine) -> None:
        """``engine``: whose counts are shown."""
        super().__init__()
        self.registry.register(_OfEngine(engine))


class _OfEngine(Collector):
    """Reads the engine's counts when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """The counts as they are."""
        counts = self._engine.counts
        pairs = CounterMetricFamily("distill_pairs", "Pairs answered, by what answered.", labels=["by"])
        pairs.add_metric(["teacher"], counts.asked)
        pairs.add_metric(["known"], counts.served)
        yield pairs
        yield CounterMetricFamily("distill_packs", "Packs scored.", value=counts.packs)
        yield CounterMetricFamily("distill_embedded", "Items embedded.", value=counts.embedded)
        yield CounterMetricFamily("distill_busy_seconds", "Time that the teacher was at work.", value=counts.seconds)
        yield CounterMetricFamily("distill_turned_away", "Requests answered with 429.", value=counts.turned_away)
        yield GaugeMetricFamily(
            "distill_waiting_pairs", "Pairs that wait or are worked on.", value=self._engine.waiting
        )
        items = CounterMetricFamily(
            "distill_items", "Items needed, by where their memory came from.", labels=["side", "by"]
        )
        kept = GaugeMetricFamily("distill_memory_bytes", "Bytes of encoded items that are kept.", labels=["side"])
        for side, memories in self._engine.memories.items():
            items.add_metric([side, "encoded"], memories.encoded)
            items.add_metric([side, "kept"], memories.found)
            kept.add_metric([side], memories.kept_bytes)
        yield items
        yield kept
