"""The ends of a qualification of GPU memory: as :mod:`end`, but the pools are tensors and the limit a device copy.

An end is one of these if it is asked for paths of GPU memory. "memcpy", the limit within a host, is a copy of as many
bytes within decode's GPU.
"""

from __future__ import annotations

from base64 import b64encode
from functools import cache
from typing import Any

import numpy as np

from pdstack.transfer.channel import Identity
from pdstack.transfer.errors import TransferError
from pdstack.transfer.gpu.needs import gpu
from pdstack.transfer.gpu.store import CudaStore
from pdstack.transfer.layout import KVLayout
from pdstack.transfer.paths.base import GPU_PATHS
from pdstack.transfer.paths.blocks import BlockPeer, whole_blocks
from pdstack.transfer.paths.gpu import GpuPeer
from pdstack.transfer.paths.gpu_ways import GpuWays, exporters
from pdstack.transfer.plan import Offsets, Plan
from pdstack.transfer.qualify.limits import StreamServer
from pdstack.transfer.qualify.measure import Bytes, Reader, fill
from pdstack.transfer.transport import Transport

# What `staged` gathers and scatters here, whatever the size of a block: prefill does not know the sizes.
GRANULE = 4096


def wanted(paths: Any) -> bool:
    """True if these paths are of GPU memory."""
    return bool(set(paths or ()) & set(GPU_PATHS))


def store(pool: Any, block_bytes: int) -> CudaStore:
    """A tensor of bytes as blocks of so many."""
    layout = KVLayout(len(pool) // block_bytes, 1, 1, 1, block_bytes // 2, "uint8")
    return CudaStore(layout, pool[: layout.num_blocks * block_bytes].view(layout.shape))


class Prefill:
    """Its pool, filled with what decode will look for, and an exporter for each path that can be."""

    def __init__(self, paths: list[str], nbytes: int, owner: int, identity: Identity, host: str, ports: list[int]):
        content = np.empty(nbytes, np.uint8)
        fill(content, owner)
        own = store(gpu().torch.from_numpy(content).to(gpu().device), GRANULE)
        stream_port, limit_port = ports
        makers = exporters(own, identity, host, stream_port, "", advertise=host, patience_s=20.0)
        self.kept: list[Any] = [own]
        self.metadata: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        for path in paths:
            if path not in makers:
                self.refused[path] = "the pool lies in GPU memory"
                continue
            try:
                exporter = makers[path]()
            except (TransferError, OSError, MemoryError) as error:
                self.refused[path] = str(error)
            else:
                self.kept.append(exporter)
                self.metadata[path] = b64encode(exporter.metadata()).decode()
        server = StreamServer(host, limit_port)
        self.kept.append(server)
        self.limit = list(server.address)


class GpuPool:
    """Decode's pool as the measurement uses an array: filled whole, and read back to be compared."""

    def __init__(self, nbytes: int) -> None:
        self.tensor = gpu().torch.zeros(nbytes, dtype=gpu().torch.uint8, device=gpu().device)

    def __len__(self) -> int:
        return len(self.tensor)

    def __setitem__(self, part: slice, value: int) -> None:
        self.tensor[part] = value
        _idle()

    def __getitem__(self, part: slice) -> Bytes:
        found: Bytes = self.tensor[part].cpu().numpy()
        return found


class GpuCopy:
    """A copy of `nbytes` within the GPU, until it is done."""

    def __init__(self, nbytes: int) -> None:
        torch = gpu().torch
        self._buffers = [torch.zeros(nbytes, dtype=torch.uint8, device=gpu().device) for _ in range(2)]

    def run(self, nbytes: int) -> None:
        """Copy once."""
        self._buffers[0][:nbytes].copy_(self._buffers[1][:nbytes])
        _idle()


def _idle() -> None:
    if gpu().device != "cpu":
        gpu().torch.cuda.synchronize()


class GpuReader(Reader):
    """One path to one prefill, for blocks of any size that the plans are made of."""

    def __init__(self, path: str, metadata: bytes, pool: GpuPool, identity: Identity) -> None:
        self._path, self._metadata, self._pool = path, metadata, pool
        self._peers: list[BlockPeer] = []
        self._plan: Plan | None = None
        self._blocks: tuple[BlockPeer, Offsets, Offsets]
        self._ways: GpuWays | None = None
        self._of_size = cache(self._open)
        if path == "staged":
            self._ways = GpuWays(store(pool.tensor, GRANULE), identity, 20.0)
            self._peers.append(self._ways.staged(metadata))
        else:
            self._of_size(GRANULE)  # so that a refusal is known now

    def _open(self, block_bytes: int) -> BlockPeer:
        peer = GpuPeer(self._metadata, store(self._pool.tensor, block_bytes))
        self._peers.append(peer)
        return peer

    def read(self, plan: Plan, *, checksum: bool) -> None:
        """See the base class."""
        if plan is not self._plan:  # agents have block numbers, and make no plan
            size = int(np.gcd.reduce(np.concatenate((plan.source, plan.target, plan.nbytes))))
            peer = self._peers[0] if self._path == "staged" else self._of_size(size)
            self._plan, self._blocks = plan, (peer, *whole_blocks(plan, peer.block_bytes))
        peer, sources, targets = self._blocks
        peer.read_blocks(sources, targets, checksum=checksum)

    def transport(self, nbytes: int) -> Transport:  # noqa: ARG002  # see the base class
        """The path itself."""
        return Transport(self._path, "own path")

    def close(self) -> None:
        """See the base class."""
        for peer in self._peers:
            peer.close()
        if self._ways is not None:
            self._ways.close()
