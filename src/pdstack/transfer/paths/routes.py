"""Decode's side of `transfer.path`: takes the configured path to each prefill worker, or the first that connects."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pdstack.transfer.backends.base import Peer
from pdstack.transfer.channel import Identity
from pdstack.transfer.errors import PathUnavailable, ReadFailed, TransferError
from pdstack.transfer.layout import PoolView, Run
from pdstack.transfer.paths.base import PathPeer, Region, paths_of
from pdstack.transfer.paths.cma import CmaPeer
from pdstack.transfer.paths.shared import SharedPeer
from pdstack.transfer.paths.stream import StreamPeer
from pdstack.transfer.plan import blocks, ranges
from pdstack.transfer.transport import Transport

_log = logging.getLogger(__name__)
_DETAILS = {
    "shared": "copy from prefill's sealed pool, mapped read-only",
    "cma": "process_vm_readv with many vectors a call",
    "stream": "scattered sendmsg and recvmsg over TCP",
}


class PathImporter:
    """Connects to prefill workers over `path`, one of the own paths or ``auto``."""

    def __init__(self, path: str, pool: PoolView, identity: Identity, patience_s: float) -> None:
        self._path, self._pool = path, pool
        target = Region(pool.address, pool.nbytes)
        self._makers: dict[str, Callable[[bytes], PathPeer]] = {
            "shared": lambda metadata: SharedPeer(metadata, target),
            "cma": lambda metadata: CmaPeer(metadata, target),
            "stream": lambda metadata: StreamPeer(metadata, target, identity, patience_s=patience_s),
        }

    def connect(self, offers: Mapping[str, bytes], who: str) -> PathReader:
        """The first path of the configured ones that is offered and connects. Blocks.

        Each refusal is logged with its reason. Raises :class:`PathUnavailable` with all of them if no path is left:
        a named path never falls back to another.
        """
        refusals = []
        for name in paths_of(self._path):
            try:
                if name not in offers:
                    raise PathUnavailable(
                        f"{who} does not offer it ({', '.join(offers) or 'no path'}): set kv_transfer_path to {name} "
                        "or auto on the prefill workers too, and look in their log"
                    )
                peer = self._makers[name](offers[name])
            except TransferError as error:
                refusals.append(f"{name}: {error}")
                _log.warning("%s cannot be read over path %s: %s", who, name, error)
            else:
                _log.info("%s is read over path %s", who, name)
                return PathReader(peer, self._pool.block_bytes)
        raise PathUnavailable(
            f"kv_transfer_path is {self._path!r}, and {who} cannot be read over {'; '.join(refusals)}"
        )

    def close(self) -> None:
        """Nothing to let go of: a path writes our pool only while it reads."""


class PathReader(Peer):
    """A path's peer as the agent sees it: reads runs of whole blocks."""

    def __init__(self, peer: PathPeer, block_bytes: int) -> None:
        super().__init__()
        self._peer, self._block_bytes = peer, block_bytes

    def transport(self, nbytes: int) -> Transport:  # noqa: ARG002  # see the base class
        """The path itself, for any size."""
        return Transport(self._peer.name, _DETAILS[self._peer.name])

    def read(self, runs: Sequence[Run]) -> None:
        """See the base class; the path keeps the same law."""
        remote, local, counts = np.array(runs, np.int64).reshape(-1, 3).T
        try:
            # Not hashed by the path: the agent compares all that arrived with the ticket, once, end to end.
            self._peer.read(blocks(self._block_bytes, ranges(remote, counts), ranges(local, counts)), checksum=False)
        except ReadFailed:
            raise
        except (ValueError, TransferError) as error:
            # A stream that was altered, or a pool smaller than described: the connection is worth nothing any more.
            code = error.code if isinstance(error, TransferError) else None
            raise ReadFailed(f"the read over path {self._peer.name} failed: {error}", code=code) from error

    def tend(self) -> None:
        """Nothing to do."""

    def abort(self) -> None:
        """See the base class."""
        super().abort()
        self._peer.abort()

    def close(self) -> None:
        """See the base class."""
        self._peer.close()
