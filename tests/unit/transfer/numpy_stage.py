"""A stage of a pool in host memory, in numpy: what `gpu.staging` does with kernels, so that the path needs no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from pdstack.transfer.gpu import checksum
from pdstack.transfer.gpu.view import check_blocks
from pdstack.transfer.paths.base import Region
from pdstack.transfer.paths.stage import Stage
from pdstack.transfer.plan import Offsets
from pdstack.transfer.store import Hashes


class NumpyStage(Stage):
    """`pool` is uint8 (blocks, bytes)."""

    def __init__(self, pool: Any, array: Any, slot_bytes: int) -> None:
        super().__init__(array, slot_bytes, pool.shape[1], pool.shape[0])
        self.pool = pool
        self.closed = False
        self.adopts = True
        self.adopted: list[Region] = []

    def rows(self, slot: int, count: int) -> Any:
        start = slot * self.slot_bytes
        return self.array[start : start + count * self.block_bytes].reshape(count, self.block_bytes)

    def gather(self, blocks: Offsets, slot: int) -> None:
        self.rows(slot, len(blocks))[:] = self.pool[blocks]

    def adopt(self, region: Region) -> Callable[[], None] | None:
        if not self.adopts:
            return None
        self.adopted.append(region)
        return lambda: self.adopted.remove(region)

    def scatter(self, address: int, blocks: Offsets) -> Callable[[], Hashes]:
        check_blocks(blocks, self.num_blocks, "local", unique=True)
        nbytes = len(blocks) * self.block_bytes
        known = [self.region, *self.adopted]
        assert any(one.address <= address <= one.address + one.nbytes - nbytes for one in known)

        def wait() -> Hashes:
            raw = (ctypes.c_ubyte * nbytes).from_address(address)
            rows = np.frombuffer(raw, np.uint8).reshape(len(blocks), -1)
            self.pool[blocks] = rows
            return checksum.block_sums(rows, np.arange(len(blocks)), None)

        return wait

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
