"""A worker's KV pool in GPU memory, as the transfer agent sees it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from pdstack.transfer.errors import LayoutMismatch
from pdstack.transfer.gpu import checksum, copy
from pdstack.transfer.gpu.board import Board
from pdstack.transfer.gpu.lane import Lane
from pdstack.transfer.gpu.needs import gpu
from pdstack.transfer.gpu.view import ALIGN
from pdstack.transfer.layout import KVLayout, PoolView
from pdstack.transfer.plan import Offsets
from pdstack.transfer.store import BlockStore, Hashes


def check_tensor(layout: KVLayout, pool: Any) -> copy.Pool:
    """Check that a tensor is the pool that `layout` says and that kernels can use it in place.

    Raises :class:`LayoutMismatch`. numpy has no bfloat16: a layout of an unsigned dtype of the same size ("uint16")
    stands for any dtype of the tensor, if both workers' layouts say the same.
    """
    if not hasattr(pool, "data_ptr"):
        raise LayoutMismatch(f"the KV pool is a {type(pool).__name__}, wanted a numpy array or a torch tensor")
    dtype = str(pool.dtype).removeprefix("torch.")
    wanted = np.dtype(layout.dtype)
    alike = dtype == wanted.name or (wanted.kind == "u" and pool.element_size() == wanted.itemsize)
    if tuple(pool.shape) != layout.shape or not alike:
        raise LayoutMismatch(
            f"the KV pool is {dtype} {tuple(pool.shape)}, its layout says {layout.dtype} {layout.shape}: create it "
            "with torch.zeros(layout.shape, dtype=..., device='cuda')"
        )
    if pool.device.type != gpu().device:
        raise LayoutMismatch(f"the KV pool tensor lies on {pool.device}, wanted {gpu().device}: make it there")
    if layout.block_bytes % ALIGN:
        raise LayoutMismatch(f"a block has {layout.block_bytes} bytes, wanted a multiple of {ALIGN}: pad head_dim")
    return copy.pool_of(pool)


class CudaStore(BlockStore):
    """A pool of `layout.shape` in GPU memory, to be kept until the agent is closed. Any thread may call.

    The kernels of its block size are compiled here (seconds, once a machine): no transfer's time limit pays for them.
    Raises :class:`LayoutMismatch`, :class:`BackendUnavailable` without torch and Triton, :class:`ReadFailed` if the GPU
    fails.
    """

    kind = "cuda"
    hashing = checksum.NAME
    # A read within a GPU takes a millisecond a GiB: more than that is the way through the agent.
    batch_bytes = 1 << 30

    def __init__(self, layout: KVLayout, pool: Any) -> None:
        self.memory = check_tensor(layout, pool)
        super().__init__(layout, PoolView(self.memory.address, layout.block_bytes, layout.num_blocks))
        self.ordinal: int = pool.device.index or 0
        self.pool = pool
        self._lane, self._board, self._lock = Lane(self.ordinal), Board(self.ordinal), threading.Lock()
        self._lane.run(self._warm, "its kernels were made ready")

    def _warm(self) -> None:
        size = self.layout.block_bytes
        scratch = gpu().torch.zeros(2 * size, dtype=gpu().torch.uint8, device=self.pool.device)
        own = copy.pool_of(scratch)
        first, second = copy.table([0], 1, "scratch"), copy.table([1], 2, "scratch")
        copy.sum_blocks(own, first, size, first=None)
        for checked in (False, True):
            copy.copy_blocks(own, own, first, second, size, checksum=checked, first=None)

    def hashes(self, blocks: Sequence[int] | Offsets) -> Hashes:
        """uint64[n]: the checksum of each block for itself (:func:`checksum.block_sums` with `first` None).

        The blocks must be computed: see :class:`Lane`. Raises :class:`LayoutMismatch` for a block outside the pool.
        """
        with self._lock:
            self._lane.run(lambda: self._sum(blocks), "blocks were hashed")
            return self._board.fetched()

    def _sum(self, blocks: Sequence[int] | Offsets) -> None:
        self._board.begin(len(blocks))
        numbers = copy.table(blocks, self.layout.num_blocks, "hashed", board=self._board)
        self._board.fetch(copy.sum_blocks(self.memory, numbers, self.layout.block_bytes, first=None))
