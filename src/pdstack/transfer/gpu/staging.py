"""Pinned host memory through which the blocks of a CUDA pool leave for another host, or arrive from one.

One kernel gathers blocks from the GPU straight into host memory, and one scatters them from there: 45 and 42 GB/s on an
H100 (PCIe 5), where a copy of one run does 54. So no GPU memory is needed beside the pool.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pdstack.transfer.errors import BackendUnavailable, LayoutMismatch, ReadFailed
from pdstack.transfer.gpu import copy
from pdstack.transfer.gpu.driver import check, driver, use
from pdstack.transfer.gpu.lane import Lane
from pdstack.transfer.gpu.needs import gpu
from pdstack.transfer.gpu.store import CudaStore
from pdstack.transfer.paths.base import Region
from pdstack.transfer.paths.stage import Stage
from pdstack.transfer.plan import Offsets
from pdstack.transfer.store import Hashes

_log = logging.getLogger(__name__)
# Of cuda.h: the pages stay where they are, for all contexts; kernels reach them; they are mapped to be read only.
_PORTABLE, _MAPPED, _READ_ONLY = 1, 2, 8


class Pinned:
    """Host memory that kernels can use: `address` is the GPU's. Raises :class:`BackendUnavailable`."""

    def __init__(self, region: Region, ordinal: int, *, read_only: bool = False) -> None:
        self.region, self._library = region, driver()
        use(self._library, ordinal)
        there, flags = ctypes.c_void_p(region.address), _PORTABLE | _MAPPED | (_READ_ONLY if read_only else 0)
        code = self._library.cuMemHostRegister_v2(there, ctypes.c_size_t(region.nbytes), flags)
        fix = f"{region.nbytes} bytes cannot be pinned: raise the container's memlock limit (ulimit -l unlimited)"
        check(self._library, code, "cuMemHostRegister", fix)
        found = ctypes.c_uint64()
        code = self._library.cuMemHostGetDevicePointer_v2(ctypes.byref(found), there, 0)
        check(self._library, code, "cuMemHostGetDevicePointer", "this GPU does not read host memory in place")
        self.address = found.value

    def close(self) -> None:
        """Unpin. No kernel may use the memory any more."""
        code = self._library.cuMemHostUnregister(ctypes.c_void_p(self.region.address))
        check(self._library, code, "cuMemHostUnregister", "an earlier kernel failed; see its error", ReadFailed)


class PinnedStage(Stage):
    """A stage of a CUDA pool in `array`, whole slots of `slot_bytes`. Raises as :class:`Pinned` does."""

    def __init__(self, store: CudaStore, array: npt.NDArray[np.uint8], slot_bytes: int) -> None:
        super().__init__(array, slot_bytes, store.view.block_bytes, store.view.num_blocks)
        self._store, self._lane = store, Lane(store.ordinal)
        # Triton's interpreter takes host memory as it is.
        self._pinned = [] if gpu().device == "cpu" else [Pinned(self.region, store.ordinal)]

    def adopt(self, region: Region) -> Callable[[], None] | None:
        """See the base class. It takes a GPU that reads host pages which nobody here may write."""
        if gpu().device == "cpu":
            return lambda: None
        try:
            pinned = Pinned(region, self._store.ordinal, read_only=True)
        except BackendUnavailable as error:
            _log.info("prefill's staging memory is copied before it is scattered: %s", error)
            return None
        self._pinned.append(pinned)

        def end() -> None:
            self._pinned.remove(pinned)
            pinned.close()

        return end

    def _there(self, address: int, nbytes: int) -> copy.Pool:
        """Host memory as the GPU sees it. Raises :class:`LayoutMismatch` for any that is not pinned for it."""
        if gpu().device == "cpu":
            return copy.Pool(address, nbytes)
        for pinned in list(self._pinned):
            start = address - pinned.region.address
            if 0 <= start <= pinned.region.nbytes - nbytes:
                return copy.Pool(pinned.address + start, nbytes)
        raise LayoutMismatch(f"{nbytes} bytes at {address:#x} are neither in a slot nor in adopted memory")

    def gather(self, blocks: Offsets, slot: int) -> None:
        """See the base class."""
        self._lane.run(partial(self._gather, blocks, slot), "blocks were gathered into host memory")

    def _gather(self, blocks: Offsets, slot: int) -> None:
        numbers = copy.table(blocks, self.num_blocks, "staged")
        run = self._there(self.address(slot), self.slot_bytes)
        copy.gather(self._store.memory, numbers, self.block_bytes, run, checksum=False)

    def scatter(self, address: int, blocks: Offsets) -> Callable[[], Hashes]:
        """See the base class. The hashes are of what the kernel read from there."""
        wait = self._lane.begin(partial(self._scatter, address, blocks), "blocks were spread from host memory")
        return lambda: _unsigned(wait())

    def _scatter(self, address: int, blocks: Offsets) -> Any:
        numbers = copy.table(blocks, self.num_blocks, "local", unique=True)
        size = self.block_bytes
        run = self._there(address, len(blocks) * size)
        return copy.scatter(run, self._store.memory, numbers, size, checksum=True, first=None)

    def finish(self) -> None:
        """See the base class."""
        self._lane.finish()

    def close(self) -> None:
        """See the base class."""
        for pinned in self._pinned:
            pinned.close()


def _unsigned(sums: Any) -> Hashes:
    found: Hashes = sums.cpu().numpy().view(np.uint64)
    return found
