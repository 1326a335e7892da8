"""The ways to read a GPU pool: what prefill offers, how decode connects. Imported only where the pool is a tensor."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from pdstack.transfer.backends.base import Exporter, Peer
from pdstack.transfer.channel import Identity
from pdstack.transfer.errors import ReadFailed, TransferError
from pdstack.transfer.gpu.staging import PinnedStage
from pdstack.transfer.gpu.store import CudaStore
from pdstack.transfer.layout import KVLayout, allocate_pool
from pdstack.transfer.paths.base import AUTO, BACKEND, PATHS, PathPeer
from pdstack.transfer.paths.blocks import BlockPeer
from pdstack.transfer.paths.cma import CmaPeer
from pdstack.transfer.paths.gpu import GpuExporter, GpuPeer
from pdstack.transfer.paths.offers import Offers
from pdstack.transfer.paths.routes import PathReader
from pdstack.transfer.paths.shared import SharedPeer
from pdstack.transfer.paths.stage import SLOT_BYTES, SLOTS
from pdstack.transfer.paths.staged import StagedExporter
from pdstack.transfer.paths.staged_peer import StagedPeer
from pdstack.transfer.paths.stream import StreamPeer
from pdstack.transfer.store import BlockStore, Hashes, HostStore
from pdstack.transfer.transport import Transport

_log = logging.getLogger(__name__)
# The host paths that staged goes over, best first.
CARRIERS = PATHS


def _cuda(store: BlockStore) -> CudaStore:
    if not isinstance(store, CudaStore):
        raise TypeError(f"a {type(store).__name__} has none of the GPU's ways")
    return store


def _stage(store: CudaStore, path: str) -> tuple[PinnedStage, HostStore]:
    """Slots for a store, each of whole blocks, in memory that `path` (see `allocate_pool`) needs."""
    size = store.view.block_bytes
    slot_bytes = max(SLOT_BYTES // size, 1) * size
    slots = KVLayout(SLOTS, 1, 1, 1, slot_bytes // 2, "uint8")
    memory = allocate_pool(slots, path)
    return PinnedStage(store, memory.reshape(-1).view(np.uint8), slot_bytes), HostStore(slots, memory)


def exporters(
    store: BlockStore,
    identity: Identity,
    listen_host: str,
    stream_port: int,
    shared_directory: str,
    *,
    advertise: str,
    patience_s: float,
) -> dict[str, Callable[[], Exporter]]:
    """How prefill opens each path. `staged` listens at the port after `stream_port`, which is its carrier's."""
    own = _cuda(store)

    def staged() -> Exporter:
        with contextlib.ExitStack() as undo:
            stage, memory = _stage(own, AUTO)
            undo.callback(stage.close)
            carriers = Offers.open(
                AUTO,
                memory,
                identity,
                listen_host=listen_host,
                advertise=advertise,
                patience_s=patience_s,
                stream_port=stream_port,
                shared_directory=shared_directory,
            )
            undo.callback(carriers.close)
            port = stream_port + 1 if stream_port else 0
            exporter = StagedExporter(
                stage, carriers, identity, listen_host, port, advertise=advertise, patience_s=patience_s
            )
            undo.pop_all()  # they are the exporter's now
            return exporter

    return {"cuda_ipc": lambda: GpuExporter(own), "staged": staged}


class GpuReader(PathReader):
    """A peer of whole blocks as the agent sees it."""

    def __init__(self, peer: BlockPeer, detail: str) -> None:
        super().__init__(peer, peer.block_bytes)
        self._blocks, self._detail = peer, detail

    def transport(self, nbytes: int) -> Transport:  # noqa: ARG002  # see the base class
        """The path, and how it goes."""
        return Transport(self._blocks.name, self._detail)

    def read_blocks(self, remote: Sequence[int], local: Sequence[int]) -> Hashes | None:
        """See the base class: the hashes come with the copy."""
        try:
            return self._blocks.read_blocks(np.array(remote, np.int64), np.array(local, np.int64))
        except ReadFailed:
            raise
        except TransferError as error:
            # Frames that were altered, or a pool smaller than described: the connection is worth nothing any more.
            about = f"the read over path {self._blocks.name} failed: {error}"
            raise ReadFailed(about, code=error.code) from error


class GpuWays:
    """How decode connects over each path. The staging memory of all peers together is made when it is first needed."""

    def __init__(self, store: BlockStore, identity: Identity, patience_s: float) -> None:
        self._store, self._identity, self._patience_s = _cuda(store), identity, patience_s
        self._lock = threading.Lock()
        self._landing: PinnedStage | None = None
        self.makers: dict[str, Callable[[bytes], Peer]] = {"cuda_ipc": self._mapped, "staged": self._staged}

    def _mapped(self, metadata: bytes) -> Peer:
        return GpuReader(GpuPeer(metadata, self._store), "one kernel from prefill's GPU pool, mapped by CUDA IPC")

    def staged(self, metadata: bytes) -> StagedPeer:
        """A peer over the path staged. Raises :class:`ReadFailed`."""
        with self._lock:
            if self._landing is None:
                self._landing, _ = _stage(self._store, BACKEND)
            stage = self._landing
        makers: dict[str, Callable[[bytes], PathPeer]] = {
            "shared": partial(SharedPeer, target=stage.region),
            "cma": partial(CmaPeer, target=stage.region),
            "stream": partial(StreamPeer, target=stage.region, identity=self._identity, patience_s=self._patience_s),
        }
        carriers = {name: makers[name] for name in CARRIERS}
        return StagedPeer(metadata, stage, self._identity, carriers, self._patience_s)

    def _staged(self, metadata: bytes) -> Peer:
        peer = self.staged(metadata)
        _log.info("prefill's GPU blocks come through host memory, over %s", peer.carrier)
        how = "read there in place" if peer.in_place else "copied"
        return GpuReader(peer, f"gathered into host memory, over {peer.carrier}, {how}, and scattered")

    def close(self) -> None:
        """Let go of the staging memory. All peers must be closed before."""
        if self._landing is not None:
            self._landing.close()
