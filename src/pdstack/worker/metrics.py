"""Prometheus metrics of the worker process (those of the KV transfer are the transfer agent's own)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# From one step of a tiny model to a long prompt on a slow CPU.
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class WorkerMetrics:
    """Counters and histograms of the request handlers, on `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "pdstack_requests",
            "Finished requests: ok, cancelled, refused, error",
            ["outcome"],
            registry=registry,
        )
        self.in_flight = Gauge("pdstack_requests_in_flight", "Requests being handled now", registry=registry)
        self.prompt_tokens = Counter("pdstack_prompt_tokens", "Tokens of prompts received", registry=registry)
        self.cached_tokens = Counter(
            "pdstack_cached_prompt_tokens", "Tokens of prompts found in the prefix cache", registry=registry
        )
        self.generated_tokens = Counter("pdstack_generated_tokens", "Tokens given to clients", registry=registry)
        self.prefill_again = Counter(
            "pdstack_prefill_again",
            "Times that decode asked prefill for a prompt once more, by why its KV was lost",
            ["reason"],
            registry=registry,
        )
        self.first_token = Histogram(
            "pdstack_time_to_first_token_seconds",
            "From the arrival of a request at this worker to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "pdstack_inter_token_latency_seconds",
            "Between two tokens of one request",
            buckets=SECONDS,
            registry=registry,
        )


class EngineCollector(Collector):
    """Reports the numeric fields of the engine's statistics as gauges, read at the moment of the scrape."""

    def __init__(self, read: Callable[[], dict[str, Any]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """Yield one gauge `pdstack_engine_<field>` per numeric field."""
        for name, value in self._read().items():
            if isinstance(value, int | float):
                yield GaugeMetricFamily(f"pdstack_engine_{name}", f"Engine statistic {name}", value=float(value))
