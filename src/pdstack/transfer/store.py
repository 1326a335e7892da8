"""Where a worker's blocks lie, and the hash by which both ends know them: one 64-bit number a block.

A block's hash is taken by prefill as soon as the block is final, and again by decode of what arrived, in the pass that
copies it where the path can.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pdstack.transfer.layout import KVLayout, PoolView, check_pool

Hashes = npt.NDArray[np.uint64]

# A longer block is hashed in pieces of so many bytes, and the pieces' hashes once more: a piece is small enough to be
# still in the core's own cache after the copy, so that hashing costs no second trip to memory.
HASH_UNIT = 256 << 10


class BlockStore(ABC):
    """The blocks of `pool`, an array or a tensor. `hashing` names the function: ends must name the same to compare."""

    kind: str
    hashing: str
    pool: Any
    # What is read at once: other requests' reads from the same prefill come between.
    batch_bytes = 64 << 20

    def __init__(self, layout: KVLayout, view: PoolView) -> None:
        self.layout, self.view = layout, view

    @abstractmethod
    def hashes(self, blocks: Sequence[int]) -> Hashes:
        """One hash for each of `blocks`, as they are now."""


class HostStore(BlockStore):
    """Blocks in this process's memory. Raises :class:`LayoutMismatch` for a pool that is not what `layout` says."""

    kind = "host"
    hashing = "xxh3-64"

    def __init__(self, layout: KVLayout, pool: npt.NDArray[np.generic]) -> None:
        super().__init__(layout, check_pool(layout, pool))
        self.pool = pool
        flat: Any = pool.view(np.uint8).reshape(pool.shape[0], -1)
        self._rows = flat

    def hashes(self, blocks: Sequence[int]) -> Hashes:
        """XXH3-64. The interpreter lock is free while a long block is hashed."""
        nbytes = self.layout.block_bytes
        pieces = [
            xxhash.xxh3_64_intdigest(memoryview(self._rows[block])[begin : begin + HASH_UNIT])
            for block in blocks
            for begin in range(0, nbytes, HASH_UNIT)
        ]
        return fold(np.array(pieces, np.uint64), nbytes)


def fold(pieces: Hashes, block_bytes: int) -> Hashes:
    """The hash of each block from those of its pieces, which follow one another block by block."""
    each = -(-block_bytes // HASH_UNIT)
    if each == 1:
        return pieces
    rows = pieces.astype("<u8").reshape(-1, each)
    return np.array([xxhash.xxh3_64_intdigest(row.tobytes()) for row in rows], np.uint64)


def store_of(layout: KVLayout, pool: Any) -> BlockStore:
    """The store of a worker's pool: a numpy array, or a torch tensor in GPU memory (whose kernels are compiled now).

    Raises :class:`LayoutMismatch`, :class:`BackendUnavailable`.
    """
    if isinstance(pool, np.ndarray):
        return HostStore(layout, pool)
    from pdstack.transfer.gpu.store import CudaStore  # which itself is a store

    return CudaStore(layout, pool)
