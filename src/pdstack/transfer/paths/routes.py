"""Decode's side of `transfer.path`: every way to every prefill worker, and which of them is taken.

:class:`Importers` belongs to the agent and knows how to connect; :class:`Routes` belongs to one prefill worker.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pdstack.transfer.backends.base import Peer, open_importer
from pdstack.transfer.channel import Identity
from pdstack.transfer.choice import Change, Choice
from pdstack.transfer.errors import PathUnavailable, ReadFailed, TransferError
from pdstack.transfer.layout import Run
from pdstack.transfer.paths.base import AUTO, BACKEND, PathPeer, Region, paths_of
from pdstack.transfer.paths.cma import CmaPeer
from pdstack.transfer.paths.shared import SharedPeer
from pdstack.transfer.paths.stream import StreamPeer
from pdstack.transfer.plan import Plan, blocks, ranges
from pdstack.transfer.store import BlockStore, Hashes, fold
from pdstack.transfer.transport import Transport

if TYPE_CHECKING:
    from pdstack.transfer.config import TransferConfig  # which itself asks which paths there are

_log = logging.getLogger(__name__)
_DETAILS = {
    "shared": "copy from prefill's sealed pool, mapped read-only",
    "cma": "process_vm_readv with many vectors a call",
    "stream": "scattered sendmsg and recvmsg over TCP",
}


class Importers:
    """All that this agent may read with: the own paths and the backend, as `config.path` allows.

    Opening blocks. Raises :class:`BackendUnavailable` if only the backend may be used and it cannot.
    """

    def __init__(self, config: TransferConfig, name: str, store: BlockStore, identity: Identity) -> None:
        self._config, self._pool = config, store.view
        self._allowed = paths_of(config.path, store.kind)
        self._closers: list[Callable[[], None]] = []
        self._makers: dict[str, Callable[[bytes], Peer]]
        if store.kind == "cuda":
            from pdstack.transfer.paths.gpu_ways import GpuWays  # which builds on this module

            ways = GpuWays(store, identity, config.read_timeout_s)
            self._makers = ways.makers
            self._closers.append(ways.close)
        else:
            self._makers = self._host(name, identity)

    def _host(self, name: str, identity: Identity) -> dict[str, Callable[[bytes], Peer]]:
        config, pool = self._config, self._pool
        target, patience_s = Region(pool.address, pool.nbytes), config.read_timeout_s
        makers: dict[str, Callable[[bytes], Peer]] = {
            "shared": lambda metadata: self._reader(SharedPeer(metadata, target)),
            "cma": lambda metadata: self._reader(CmaPeer(metadata, target)),
            "stream": lambda metadata: self._reader(StreamPeer(metadata, target, identity, patience_s=patience_s)),
        }
        if BACKEND in self._allowed:
            try:
                backend = open_importer(config.backend, name, pool)
                makers[BACKEND] = backend.connect
                self._closers.append(backend.close)
            except TransferError as error:
                if config.path != AUTO:
                    raise
                _log.warning("KV is not read over %s: %s", config.backend, error)
        return makers

    def _reader(self, peer: PathPeer) -> PathReader:
        return PathReader(peer, self._pool.block_bytes)

    def connect(self, offers: Mapping[str, bytes], who: str) -> Routes:
        """Connect over the best way that works. `offers` is the metadata of each path, and of :data:`BACKEND`.

        Each refusal is logged with its reason. Raises :class:`PathUnavailable` with all of them if no way is left, or
        the error itself where there is only one: a named path never falls back to another.
        """
        allowed = self._allowed
        measured = [name for name in self._config.order.get(who, ()) if name in allowed]
        names = measured + [name for name in allowed if name not in measured]
        missing = [name for name in names if name not in offers or name not in self._makers]
        for name in missing:
            if len(names) == 1:
                raise PathUnavailable(
                    f"kv_transfer_path is {name!r}, and {who} does not offer it ({', '.join(offers) or 'no path'}): "
                    f"set kv_transfer_path to {name} or auto on the prefill workers too, and look in their log"
                )
            _log.info("%s does not offer KV over %s", who, name)
        names = [name for name in names if name not in missing]
        if not names:
            raise PathUnavailable(f"{who} and this worker have no path in common, nor the backend: see both logs")
        routes = Routes({name: (self._makers[name], offers[name]) for name in names}, who, self._config.recheck_every)
        routes.connect()
        return routes

    def close(self) -> None:
        """Unregister the pool with the backend, or free staging memory. All routes must be closed before."""
        for close in self._closers:
            close()


class Routes:
    """The ways to one prefill worker, connected when first needed. One thread at a time, except :meth:`abort`."""

    def __init__(self, ways: Mapping[str, tuple[Callable[[bytes], Peer], bytes]], who: str, recheck_every: int) -> None:
        self._ways, self._who = dict(ways), who
        self._lock = threading.Lock()  # of what abort() reads
        self._peers: dict[str, Peer] = {}
        self._parked: list[Peer] = []
        self._aborted = False
        self.choice = Choice(list(ways), recheck_every)

    def connect(self) -> None:
        """Connect the first that can be. Raises what the last one raised, or :class:`PathUnavailable` with all."""
        refusals: list[str] = []
        while True:
            name = self.choice.current
            try:
                self.peer(name)
            except TransferError as error:
                refusals.append(f"{name}: {error}")
                _log.warning("%s cannot be read over %s: %s", self._who, name, error)
                if self.choice.other(name) is None:
                    if len(self._ways) > 1:
                        raise PathUnavailable(f"{self._who} cannot be read over {'; '.join(refusals)}") from error
                    if name == BACKEND:
                        raise
                    raise PathUnavailable(
                        f"kv_transfer_path is {name!r}, and {self._who} cannot be read over {name}: {error}"
                    ) from error
                self.choice.drop(name, str(error))
            else:
                _log.info("%s is read over %s", self._who, name)
                return

    def peer(self, name: str) -> Peer:
        """The connection over one way, made now if need be. Raises a :class:`TransferError`."""
        known = self._peers.get(name)
        if known is not None:
            return known
        make, metadata = self._ways[name]
        peer = make(metadata)
        with self._lock:
            self._peers[name] = peer
            aborted = self._aborted
        if aborted:
            peer.abort()
        return peer

    def forget(self, name: str) -> None:
        """Let go of a connection over which a read failed; the next read makes a new one."""
        with self._lock:
            peer = self._peers.pop(name, None)
        if peer is not None:
            self._let_go(peer)

    def drop(self, name: str, reason: str) -> Change | None:
        """This way is not taken any more. Returns the change if it was the one in use."""
        self.forget(name)
        return self.choice.drop(name, reason)

    def _let_go(self, peer: Peer) -> None:
        if peer.parked:
            self._parked.append(peer)
        else:
            peer.close()

    def tend(self) -> None:
        """Housekeeping; called every heartbeat while nothing is read."""
        for peer in list(self._peers.values()):
            peer.tend()

    def abort(self) -> None:
        """Make a read in progress end soon with an error. Thread-safe; nothing can be read afterwards."""
        with self._lock:
            self._aborted = True
            peers = list(self._peers.values())
        for peer in peers:
            peer.abort()

    def close(self) -> None:
        """Let go of all connections but those that are parked."""
        for name in list(self._peers):
            self.forget(name)

    def take_parked(self) -> list[Peer]:
        """The parked connections, whose closing is the caller's now."""
        parked, self._parked = self._parked, []
        return parked


class PathReader(Peer):
    """A path's peer as the agent sees it: reads whole blocks."""

    def __init__(self, peer: PathPeer, block_bytes: int) -> None:
        super().__init__()
        self._peer, self._block_bytes = peer, block_bytes

    def transport(self, nbytes: int) -> Transport:  # noqa: ARG002  # see the base class
        """The path itself, for any size."""
        return Transport(self._peer.name, _DETAILS[self._peer.name])

    def read(self, runs: Sequence[Run]) -> None:
        """See the base class; the path keeps the same law."""
        remote, local, counts = np.array(runs, np.int64).reshape(-1, 3).T
        self._read(blocks(self._block_bytes, ranges(remote, counts), ranges(local, counts)), checksum=False)

    def read_blocks(self, remote: Sequence[int], local: Sequence[int]) -> Hashes | None:
        """See the base class."""
        size, targets = self._block_bytes, np.array(local, np.int64)
        # Neighbours are not merged here: each block has a hash of its own.
        plan = Plan(np.array(remote, np.int64) * size, targets * size, np.full(len(targets), size, np.int64))
        found = self._read(plan, checksum=True)
        if found is None:
            return None
        hashes = np.empty(len(targets), np.uint64)
        hashes[np.argsort(targets)] = fold(found, size)  # a plan is in the order of its targets
        return hashes

    def _read(self, plan: Plan, *, checksum: bool) -> Hashes | None:
        try:
            return self._peer.read(plan, checksum=checksum)
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
