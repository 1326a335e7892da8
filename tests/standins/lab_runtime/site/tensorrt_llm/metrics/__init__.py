"""TensorRT-LLM's Prometheus metrics, by their names."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Histogram


class MetricsCollector:
    """Counts finished requests and their latency on the global registry."""

    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels
        names = [*labels, "finished_reason"]
        self._finished = Counter("request_success", "Count of successfully processed requests.", names)
        self._latency = Histogram("e2e_request_latency_seconds", "End to end request latency.", list(labels))
        self._first = Histogram("time_to_first_token_seconds", "Time to first token.", list(labels))

    def log_metrics_dict(self, found: dict[str, Any]) -> None:
        """Take note of a finished request."""
        if not found:
            return
        self._finished.labels(**self.labels, finished_reason=found["finished_reason"]).inc()
        self._latency.labels(**self.labels).observe(found["e2e"])
        self._first.labels(**self.labels).observe(found["ttft"])
