"""The worker's configuration file (JSON), parsed strictly: an unknown key, a missing key or a wrong type is an error.

Durations are seconds, sizes of the pool are blocks, `block_size`, `max_context` and `prefill_chunk` are tokens.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROLES = ("prefill", "decode", "aggregated")
BACKENDS = ("ucx", "nixl")
PATHS = ("backend", "shared", "cma", "stream", "auto")


class ConfigError(ValueError):
    """The configuration file cannot be used; the text names the key."""


@dataclass(frozen=True)
class Listen:
    """Where a server of this process listens."""

    host: str
    port: int


@dataclass(frozen=True)
class EngineSection:
    """Settings of the reference engine; the engine's own EngineConfig says what each means."""

    block_size: int = 16
    kv_blocks: int = 1024
    max_context: int = 2048
    max_batch: int = 64
    prefill_chunk: int = 128
    queue_limit: int = 256
    queue_timeout_s: float = 30.0
    threads: int = 2
    prefix_cache: bool = True
    default_max_tokens: int = 512


@dataclass(frozen=True)
class TransferSection:
    """Settings of the transfer agent, as :class:`pdstack.transfer.TransferConfig` explains them."""

    backend: str
    cluster_key_file: str
    listen: Listen
    advertise: str
    path: str = "backend"
    ticket_ttl_s: float = 60.0
    read_timeout_s: float = 20.0
    heartbeat_s: float = 2.0
    order: dict[str, list[str]] = field(default_factory=dict)
    recheck_every: int = 100
    stream_port: int = 0
    shared_directory: str = ""
    resume_s: float = 5.0
    stall_timeout_s: float = 60.0
    window_bytes: int = 256 << 20
    audit_file: str = ""
    audit_bytes: int = 16 << 20
    audit_files: int = 4


@dataclass(frozen=True)
class WorkerConfig:
    """One worker. `transfer` is required for prefill and decode, and refused for aggregated."""

    name: str
    role: str
    namespace: str
    model_name: str
    model_path: str
    etcd_endpoints: list[str]
    nats_server: str
    status: Listen
    engine: EngineSection = EngineSection()
    transfer: TransferSection | None = None
    drain_timeout_s: float = 30.0
    migration_limit: int = 3

    @property
    def audience(self) -> str:
        """Whom tickets of this worker are for: the same namespace and model."""
        return f"{self.namespace}/{self.model_name}"


def load(path: Path) -> WorkerConfig:
    """Read and check a configuration file. Raises ConfigError, also when the file cannot be read."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error
    try:
        config: WorkerConfig = parse(WorkerConfig, data, "")
        check(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def check(config: WorkerConfig) -> None:
    """Check what types alone cannot say."""
    if config.role not in ROLES:
        raise ConfigError(f"role: found {config.role!r}, wanted one of {', '.join(ROLES)}")
    if (config.transfer is None) != (config.role == "aggregated"):
        raise ConfigError(
            f"transfer: role {config.role} "
            + ("moves no KV cache, leave this section out" if config.transfer else "needs this section, it is missing")
        )
    if config.transfer is not None and config.transfer.backend not in BACKENDS:
        raise ConfigError(f"transfer.backend: found {config.transfer.backend!r}, wanted one of {', '.join(BACKENDS)}")
    if config.transfer is not None and config.transfer.path not in PATHS:
        raise ConfigError(f"transfer.path: found {config.transfer.path!r}, wanted one of {', '.join(PATHS)}")
    if not config.etcd_endpoints:
        raise ConfigError("etcd_endpoints: found an empty list, wanted at least one URL such as http://10.0.0.1:2379")
    for endpoint in config.etcd_endpoints:
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"etcd_endpoints: found {endpoint!r}, wanted a URL such as http://10.0.0.1:2379")
    if not config.nats_server.startswith("nats://"):
        raise ConfigError(f"nats_server: found {config.nats_server!r}, wanted a URL such as nats://10.0.0.1:4222")


def parse(kind: Any, data: Any, where: str) -> Any:
    """Build `kind` (a dataclass, a list or a plain type) from decoded JSON; `where` is the key path for messages."""
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, data, where)
    if isinstance(kind, types.UnionType):
        if data is None and type(None) in typing.get_args(kind):
            return None
        return parse(next(k for k in typing.get_args(kind) if k is not type(None)), data, where)
    if typing.get_origin(kind) is list:
        if not isinstance(data, list):
            raise ConfigError(f"{where}: found {data!r}, wanted a list")
        return [parse(typing.get_args(kind)[0], item, f"{where}[{at}]") for at, item in enumerate(data)]
    if typing.get_origin(kind) is dict:
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: found {data!r}, wanted an object")
        return {key: parse(typing.get_args(kind)[1], item, f"{where}.{key}") for key, item in data.items()}
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if type(data) is not kind:
        raise ConfigError(f"{where}: found {data!r}, wanted {kind.__name__}")
    return data


def _parse_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{where or 'file'}: found {data!r}, wanted an object")
    hints = typing.get_type_hints(kind)
    fields = {each.name: each for each in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ConfigError(f"{prefix}{unknown[0]}: unknown key; known here: {', '.join(fields)}")
    missing = [
        name
        for name, each in fields.items()
        if name not in data and each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]}: is missing")
    return kind(**{name: parse(hints[name], value, prefix + name) for name, value in data.items()})
