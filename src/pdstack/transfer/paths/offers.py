"""Prefill's side of `transfer.path`: one exporter for each path that decode workers may take, beside the backend's."""

from __future__ import annotations

import logging
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from typing import Any

from pdstack.transfer.backends.base import Exporter
from pdstack.transfer.channel import Identity
from pdstack.transfer.errors import PathUnavailable, ProtocolError, TransferError
from pdstack.transfer.paths.base import AUTO, BACKEND, GPU_PATHS, PATHS, Region, paths_of
from pdstack.transfer.paths.cma import CmaExporter
from pdstack.transfer.paths.pools import shared_pool
from pdstack.transfer.paths.shared import SharedExporter
from pdstack.transfer.paths.stream import StreamExporter
from pdstack.transfer.store import BlockStore, HostStore

_log = logging.getLogger(__name__)
# What a path's metadata may measure; they are a few hundred bytes of JSON.
_MAX_BLOB = 4096


class Offers:
    """The exporters of the chosen paths. Opening and closing block."""

    def __init__(self, exporters: Mapping[str, Exporter]) -> None:
        self._exporters = dict(exporters)

    @classmethod
    def open(
        cls,
        path: str,
        store: BlockStore,
        identity: Identity,
        *,
        listen_host: str,
        advertise: str,
        patience_s: float,
        stream_port: int = 0,
        shared_directory: str = "",
    ) -> Offers:
        """What `path` (see :data:`CHOICES`) needs of prefill; nothing for ``backend``.

        Raises :class:`PathUnavailable` if the named path cannot be offered; with ``auto`` each one that cannot is
        logged with its reason, and the backend is left. `patience_s`: how long a stream waits for a silent reader.
        """
        if isinstance(store, HostStore):
            region = Region.of(store.pool)
            makers: dict[str, Callable[[], Exporter]] = {
                "shared": lambda: SharedExporter(shared_pool(store.pool), shared_directory or None),
                "cma": lambda: CmaExporter(region),
                "stream": lambda: StreamExporter(
                    region, identity, listen_host, stream_port, advertise=advertise, patience_s=patience_s
                ),
            }
        else:
            from pdstack.transfer.paths import gpu_ways  # which builds on this module

            makers = gpu_ways.exporters(
                store, identity, listen_host, stream_port, shared_directory, advertise=advertise, patience_s=patience_s
            )
        exporters: dict[str, Exporter] = {}
        for name in paths_of(path, store.kind):
            if name == BACKEND:
                continue
            try:
                exporters[name] = makers[name]()
            except (OSError, TransferError) as error:
                if path != AUTO:
                    raise PathUnavailable(
                        f"kv_transfer_path is {path!r}, and KV cannot be offered over {name}: {error}"
                    ) from error
                _log.warning("KV is not offered over path %s: %s", name, error)
        return cls(exporters)

    @property
    def names(self) -> list[str]:
        """The paths that are offered, in the order of :data:`PATHS`."""
        return list(self._exporters)

    def wire(self) -> dict[str, str]:
        """Each path's metadata in base64. They are capabilities: for authenticated peers only."""
        return {name: b64encode(exporter.metadata()).decode() for name, exporter in self._exporters.items()}

    def tend(self) -> None:
        """Housekeeping; called every heartbeat of a peer."""
        for exporter in self._exporters.values():
            exporter.tend()

    def close(self) -> None:
        """Nobody gets the pool any more. A reader that has mapped it can go on, but its control channel is lost."""
        for exporter in self._exporters.values():
            exporter.close()


def read_offers(value: Any, who: str) -> dict[str, bytes]:
    """The metadata a path from what :meth:`Offers.wire` gave; None stands for a peer without paths.

    Paths that this release does not know are left out. Raises :class:`ProtocolError` for anything that is not text in
    base64 of at most 4 KiB.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ProtocolError(f"{who}'s paths are {type(value).__name__}, wanted an object")
    offers = {}
    for name in (*PATHS, *GPU_PATHS):
        if name not in value:
            continue
        blob = value[name]
        if not isinstance(blob, str) or len(blob) > _MAX_BLOB * 4 // 3:
            raise ProtocolError(f"{who}'s metadata of path {name} is not text of at most {_MAX_BLOB} bytes in base64")
        try:
            offers[name] = b64decode(blob, validate=True)
        except ValueError as error:
            raise ProtocolError(f"{who}'s metadata of path {name} is not base64: {error}") from None
    return offers
