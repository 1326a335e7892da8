"""Prometheus metrics of a transfer agent. All names start with ``pdstack_kv_``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class TransferMetrics:
    """The metrics of one agent, registered in `registry` (one agent per registry)."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        path = ("backend", "transport", "peer")
        self.agent = Info("pdstack_kv_agent", "Role, backend, layout and versions of this agent", registry=registry)
        self.bytes = Counter("pdstack_kv_bytes", "KV bytes read and verified", path, registry=registry)
        self.transfers = Counter("pdstack_kv_transfers", "Transfers completed and verified", path, registry=registry)
        self.failures = Counter(
            "pdstack_kv_failures", "Transfers that failed, by reason", ("backend", "peer", "code"), registry=registry
        )
        self.seconds = Histogram(
            "pdstack_kv_transfer_seconds",
            "Time of a transfer: phase total is what a request waits, read is the bytes moving, checksum the check",
            ("backend", "transport", "phase"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.held = Counter(
            "pdstack_kv_held_bytes", "KV bytes that decode had already and did not move", ("peer",), registry=registry
        )
        self.resumes = Counter(
            "pdstack_kv_resumes", "Transfers that went on after a lost connection", ("peer",), registry=registry
        )
        self.retries = Counter(
            "pdstack_kv_retries",
            "Transfers of which blocks came wrong and were read again",
            ("peer",),
            registry=registry,
        )
        self.path_changes = Counter(
            "pdstack_kv_path_changes", "Changes of the path in use", ("peer", "before", "after"), registry=registry
        )
        self.connects = Histogram(
            "pdstack_kv_connect_seconds",
            "Time to connect to a prefill worker: handshake and backend",
            ("backend",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.refusals = Counter(
            "pdstack_kv_refusals", "Begin requests that prefill refused, by reason", ("code",), registry=registry
        )
        self.rejected_connections = Counter(
            "pdstack_kv_rejected_connections",
            "Control connections that did not authenticate",
            ("code",),
            registry=registry,
        )
        self.exports = Gauge(
            "pdstack_kv_exports", "Exports held for decode, by state: offered or granted", ("state",), registry=registry
        )
        self.releases = Counter(
            "pdstack_kv_releases", "Exports whose blocks were released, by reason", ("reason",), registry=registry
        )
        self.exported_bytes = Counter(
            "pdstack_kv_exported_bytes", "KV bytes that decode workers acknowledged", ("peer",), registry=registry
        )
        self.quarantined = Gauge(
            "pdstack_kv_quarantined_blocks", "Local blocks that a read given up may still write", registry=registry
        )
        self.peers = Gauge("pdstack_kv_peers", "Peers connected on the control channel", registry=registry)
