"""Settings of a transfer agent; the `transfer` part of worker.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pdstack.transfer.backends.base import BACKENDS
from pdstack.transfer.keys import ClusterKey
from pdstack.transfer.paths.base import BACKEND, CHOICES, GPU_PATHS, PATHS


@dataclass(frozen=True)
class TransferConfig:
    """How an agent moves KV.

    `advertise` is the address at which decode workers reach this prefill worker; `listen_port` 0 takes a free port.
    Durations are seconds. A ticket that nobody takes up is void after `ticket_ttl_s`; a read that has begun has
    `read_timeout_s`; the two ends of a control connection hear of each other every `heartbeat_s`.

    `path` is how the bytes move: ``backend``; an own path, ``shared``, ``cma`` or ``stream``, of a pool in GPU memory
    ``cuda_ipc`` or ``staged``; or ``auto``, the best of all that connect. Decode's word counts; prefill offers what its
    own allows, and the backend always (not of GPU memory). `order` is the measured order of the paths to a prefill
    worker, by its name; ``auto`` begins with it, and sends one of `recheck_every` transfers over another path to see
    whether the order still holds (0: never).

    `stream_port` 0 takes a free port. `shared_directory` is where the socket of the path shared lies, for containers
    that share a directory and no network namespace ("": in the network namespace).

    A decode agent that lost its connection has `resume_s` to go on with what it was granted. One that waits for a
    prompt to be computed gives up after `stall_timeout_s` without a new block. Prefill lets each decode agent have at
    most `window_bytes` (at least one block) announced and not yet acknowledged.

    `audit_file` gets a JSON line a transfer and refusal ("": none); at `audit_bytes` it is rotated, and `audit_files`
    earlier ones are kept.
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
    order: Mapping[str, Sequence[str]] = field(default_factory=dict)
    recheck_every: int = 100
    stream_port: int = 0
    shared_directory: str = ""
    resume_s: float = 5.0
    stall_timeout_s: float = 60.0
    window_bytes: int = 256 << 20
    audit_file: str = ""
    audit_bytes: int = 16 << 20
    audit_files: int = 4

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"kv_transfer_backend is {self.backend!r}, wanted one of: {', '.join(BACKENDS)}")
        if self.path not in CHOICES:
            raise ValueError(f"kv_transfer_path is {self.path!r}, wanted one of: {', '.join(CHOICES)}")
        for peer, names in self.order.items():
            known = (BACKEND, *PATHS, *GPU_PATHS)
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"transfer.order of {peer} has {unknown}, wanted some of {', '.join(known)}")
        for name in ("ticket_ttl_s", "read_timeout_s", "heartbeat_s", "resume_s", "stall_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"transfer.{name} is {getattr(self, name)!r}, wanted seconds, more than 0")
        for name in ("recheck_every", "stream_port", "window_bytes", "audit_bytes", "audit_files"):
            if isinstance(getattr(self, name), bool) or not 0 <= getattr(self, name) < 1 << 48:
                raise ValueError(f"transfer.{name} is {getattr(self, name)!r}, wanted a whole number from 0")

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
        known = {each.name for each in fields(cls)} - {"cluster_key", "listen_host", "listen_port"}
        if unknown := given.keys() - known:
            allowed = sorted(known | {"listen", "cluster_key_file"})
            raise ValueError(f"transfer has unknown keys {sorted(unknown)}, allowed are {allowed}")
        if "host" in listen:
            given["listen_host"] = listen["host"]
        if "port" in listen:
            given["listen_port"] = listen["port"]
        return cls(cluster_key=ClusterKey.from_file(key_file), **given)
