"""Pinned host memory through which the blocks of a CUDA pool leave for another host, or arrive from one.

One kernel gathers blocks from the GPU straight into host memory, and one scatters them from there: 45 and 42 GB/s on an
H100 (PCIe 5), where a copy of one run does 54. So no GPU memory is needed beside the pool.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pdstack.transfer.errors import ReadFailed
from pdstack.transfer.gpu import copy
from pdstack.transfer.gpu.driver import check, driver, use
from pdstack.transfer.gpu.lane import Lane
from pdstack.transfer.gpu.needs import gpu
from pdstack.transfer.gpu.store import CudaStore
from pdstack.transfer.paths.stage import Stage
from pdstack.transfer.plan import Offsets
from pdstack.transfer.store import Hashes

# Of cuda.h: the pages stay where they are, for all contexts, and kernels reach them.
_PORTABLE, _MAPPED = 1, 2


class Pinned:
    """Host memory that kernels can use: `address` is the GPU's. Raises :class:`BackendUnavailable`."""

    def __init__(self, array: npt.NDArray[np.uint8], ordinal: int) -> None:
        self._array, self._library = array, driver()
        use(self._library, ordinal)
        there, nbytes = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        code = self._library.cuMemHostRegister_v2(there, nbytes, _PORTABLE | _MAPPED)
        fix = f"{array.nbytes} bytes cannot be pinned: raise the container's memlock limit (ulimit -l unlimited)"
        check(self._library, code, "cuMemHostRegister", fix)
        found = ctypes.c_uint64()
        code = self._library.cuMemHostGetDevicePointer_v2(ctypes.byref(found), there, 0)
        check(
            self._library,
            code,
            "cuMemHostGetDevicePointer",
            "this GPU cannot read host memory: it is older than any supported",
        )
        self.address = found.value

    def close(self) -> None:
        """Unpin. No kernel may use the memory any more."""
        code = self._library.cuMemHostUnregister(ctypes.c_void_p(self._array.ctypes.data))
        check(self._library, code, "cuMemHostUnregister", "an earlier kernel failed; see its error", ReadFailed)


class PinnedStage(Stage):
    """A stage of a CUDA pool in `array`, whole slots of `slot_bytes`. Raises as :class:`Pinned` does."""

    def __init__(self, store: CudaStore, array: npt.NDArray[np.uint8], slot_bytes: int) -> None:
        super().__init__(array, slot_bytes, store.view.block_bytes, store.view.num_blocks)
        self._store, self._lane = store, Lane(store.ordinal)
        # Triton's interpreter takes host memory as it is.
        self._pinned = None if gpu().device == "cpu" else Pinned(array, store.ordinal)
        self._address = self.region.address if self._pinned is None else self._pinned.address

    def _slot(self, slot: int) -> copy.Pool:
        return copy.Pool(self._address + slot * self.slot_bytes, self.slot_bytes)

    def gather(self, blocks: Offsets, slot: int) -> None:
        """See the base class."""
        self._lane.run(partial(self._gather, blocks, slot), "blocks were gathered into host memory")

    def _gather(self, blocks: Offsets, slot: int) -> None:
        numbers = copy.table(blocks, self.num_blocks, "staged")
        copy.gather(self._store.memory, numbers, self.block_bytes, self._slot(slot), checksum=False)

    def scatter(self, slot: int, blocks: Offsets) -> Callable[[], Hashes]:
        """See the base class. The hashes are of what the kernel read from the slot."""
        wait = self._lane.begin(partial(self._scatter, slot, blocks), "blocks were spread from host memory")
        return lambda: _unsigned(wait())

    def _scatter(self, slot: int, blocks: Offsets) -> Any:
        numbers = copy.table(blocks, self.num_blocks, "local", unique=True)
        size = self.block_bytes
        return copy.scatter(self._slot(slot), self._store.memory, numbers, size, checksum=True, first=None)

    def finish(self) -> None:
        """See the base class."""
        self._lane.finish()

    def close(self) -> None:
        """See the base class."""
        if self._pinned is not None:
            self._pinned.close()


def _unsigned(sums: Any) -> Hashes:
    found: Hashes = sums.cpu().numpy().view(np.uint64)
    return found
