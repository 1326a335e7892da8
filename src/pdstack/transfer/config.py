"""Settings of a transfer agent; the `transfer` part of worker.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pdstack.transfer.backends.base import BACKENDS
from pdstack.transfer.keys import ClusterKey
from pdstack.transfer.paths.base import BACKEND, CHOICES


@dataclass(frozen=True)
class TransferConfig:
    """How an agent moves KV.

    `advertise` is the address at which decode workers reach this prefill worker; `listen_port` 0 takes a free port.
    Durations are seconds. A ticket that nobody takes up is void after `ticket_ttl_s`; a read that has begun has
    `read_timeout_s`; the two ends of a control connection hear of each other every `heartbeat_s`.

    `path` is how the bytes move: ``backend``; an own path, ``shared``, ``cma`` or ``stream``; or ``auto``, the first of
    these three that connects. Decode's word counts; prefill offers what its own allows, and the backend always.
    """

    cluster_key: ClusterKey
    backend: str = "ucx"
    path: str = BACKEND
    listen_host: str = "0.0.0.0"  # noqa: S104  # decode workers of other hosts connect here, and must authenticate
    listen_port: int = 9200
    advertise: str = "127.0.0.1"
    ticket_ttl_s: float = 60.0
    read_timeout_s: float = 20.0
    heartbeat_s: float = 2.0

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"kv_transfer_backend is {self.backend!r}, wanted one of: {', '.join(BACKENDS)}")
        if self.path not in CHOICES:
            raise ValueError(f"kv_transfer_path is {self.path!r}, wanted one of: {', '.join(CHOICES)}")
        for field in ("ticket_ttl_s", "read_timeout_s", "heartbeat_s"):
            if not getattr(self, field) > 0:
                raise ValueError(f"transfer.{field} is {getattr(self, field)!r}, wanted seconds, more than 0")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TransferConfig:
        """From worker.json's `transfer`: like the fields here, but ``cluster_key_file`` and ``listen: {host, port}``.

        Raises ValueError for unknown or missing keys, :class:`AuthenticationFailed` for a bad key file.
        """
        given = dict(values)
        listen = given.pop("listen", {})
        key_file = given.pop("cluster_key_file", None)
        if not isinstance(listen, Mapping) or listen.keys() - {"host", "port"}:
            raise ValueError(f"transfer.listen is {listen!r}, wanted an object with host and port")
        if not isinstance(key_file, str):
            raise ValueError("transfer.cluster_key_file is missing, wanted the path of the cluster key")
        known = {field.name for field in fields(cls)} - {"cluster_key", "listen_host", "listen_port"}
        if unknown := given.keys() - known:
            allowed = sorted(known | {"listen", "cluster_key_file"})
            raise ValueError(f"transfer has unknown keys {sorted(unknown)}, allowed are {allowed}")
        if "host" in listen:
            given["listen_host"] = listen["host"]
        if "port" in listen:
            given["listen_port"] = listen["port"]
        return cls(cluster_key=ClusterKey.from_file(key_file), **given)
