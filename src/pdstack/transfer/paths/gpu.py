"""Path `cuda_ipc`: decode's GPU reads prefill's pool in place, in one kernel for all blocks and their checksums.

For two processes of one host, on one GPU or on two that can access each other (NVLink, PCIe). Prefill's process takes
no part in a read: killed or frozen, its memory stays for as long as decode has mapped it (measured), and what was read
is compared block by block with the checksums that it announced before.

The law of the paths holds by the stream's order: only a kernel of this process writes our blocks, and the stream is
synchronised before :meth:`GpuPeer.read` returns or raises. A kernel cannot be stopped, so a read is cut into launches
of at most 1 GiB, and an abort waits for one of them: a millisecond within a GPU, some 40 over PCIe.
"""

from __future__ import annotations

import contextlib
from functools import partial
from threading import Event

import numpy as np

from pdstack.transfer.backends.base import Exporter
from pdstack.transfer.errors import BackendUnavailable, ProtocolError, ReadFailed
from pdstack.transfer.gpu import copy, ipc
from pdstack.transfer.gpu.board import Board
from pdstack.transfer.gpu.lane import Lane
from pdstack.transfer.gpu.store import CudaStore
from pdstack.transfer.paths.base import aborted
from pdstack.transfer.paths.blocks import BlockPeer
from pdstack.transfer.plan import Offsets
from pdstack.transfer.store import Hashes

_LAUNCH = 1 << 30


class GpuExporter(Exporter):
    """Says how to map the pool. Nothing runs here. Raises :class:`BackendUnavailable` if it has no CUDA IPC handle."""

    def __init__(self, store: CudaStore) -> None:
        self._metadata = ipc.export(store.view.address, store.view.nbytes).to_json().encode()

    def metadata(self) -> bytes:
        """The IPC handle, offset and size of the pool; boot id, PID namespace, process and GPU (UUID), as JSON.

        Whoever has it can write the pool too: CUDA knows no read-only mapping.
        """
        return self._metadata

    def tend(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to let go of: the pool's owner frees it, and only when no reader maps it any more."""


class GpuPeer(BlockPeer):
    """One exporter's pool, mapped. Raises :class:`ReadFailed` with the reason if that cannot be.

    Its code is ``not_permitted`` where it can never be: another host, a GPU that this process does not see or reach.
    """

    name = "cuda_ipc"

    def __init__(self, metadata: bytes, store: CudaStore) -> None:
        try:
            exported = ipc.Export.from_json(metadata.decode())
        except (UnicodeDecodeError, ProtocolError) as error:
            raise ReadFailed(f"the peer's cuda_ipc metadata cannot be read: {error}") from error
        try:
            self._mapping = ipc.Mapping(exported, store.ordinal)
        except BackendUnavailable as error:
            permitted = error.code != ipc.NOT_PERMITTED
            raise ReadFailed(str(error), code=None if permitted else ipc.NOT_PERMITTED) from error
        self._source = copy.Pool(self._mapping.address, self._mapping.nbytes)
        self._store = store
        self.block_bytes = store.view.block_bytes
        self._lane, self._board = Lane(store.ordinal), Board(store.ordinal)
        self._ended = Event()

    def read_blocks(self, sources: Offsets, targets: Offsets, *, checksum: bool = True) -> Hashes | None:
        """See the base class. Hashes are `gpu.checksum`'s, of the words that were read, in the same pass."""
        if self._ended.is_set():
            raise ReadFailed("this cuda_ipc peer is closed")
        found = []
        step = max(1, _LAUNCH // self.block_bytes)
        for begin in range(0, len(sources), step):
            if self._ended.is_set():
                raise aborted()
            part = slice(begin, begin + step)
            copied = partial(self._copy, sources[part], targets[part], checksum)
            self._lane.run(copied, "prefill's blocks were read")
            if checksum:
                found.append(self._board.fetched())
        return np.concatenate([np.zeros(0, np.uint64), *found]) if checksum else None

    def _copy(self, sources: Offsets, targets: Offsets, checksum: bool) -> None:
        size, board = self.block_bytes, self._board
        board.begin(len(sources) + len(targets))
        theirs = copy.table(sources, self._source.nbytes // size, "prefill's", board=board)
        ours = copy.table(targets, self._store.view.num_blocks, "local", unique=True, board=board)
        sums = copy.copy_blocks(self._source, self._store.memory, theirs, ours, size, checksum=checksum, first=None)
        if checksum:
            board.fetch(sums)

    def abort(self) -> None:
        """See the base class."""
        self._ended.set()

    def close(self) -> None:
        """See the base class. The memory of a prefill that is gone is freed with this."""
        self._ended.set()
        # After a fault of the GPU nothing can be unmapped; the driver does it when this process ends.
        with contextlib.suppress(ReadFailed):
            self._mapping.close()
