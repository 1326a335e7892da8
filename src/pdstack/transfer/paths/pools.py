"""From a worker's pool, an array, to the shared memory it lies in, so that nobody has to carry both around."""

from __future__ import annotations

from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from pdstack.transfer.errors import BackendUnavailable
from pdstack.transfer.layout import KVLayout
from pdstack.transfer.paths.shared import SharedPool

# By address. A shared pool lives as long as any view of the array that was given out.
_pools: WeakValueDictionary[int, SharedPool] = WeakValueDictionary()


def allocate_shared(layout: KVLayout) -> npt.NDArray[np.generic]:
    """A zeroed pool of `layout.shape` in a :class:`SharedPool`. Raises :class:`BackendUnavailable`."""
    shared = SharedPool(layout.block_bytes * layout.num_blocks)
    _pools[shared.region.address] = shared
    pool: npt.NDArray[np.generic] = np.asarray(shared).view(layout.dtype).reshape(layout.shape)
    return pool


def shared_pool(pool: npt.NDArray[np.generic]) -> SharedPool:
    """The shared memory that `pool` is all of. Raises :class:`BackendUnavailable` if it lies elsewhere."""
    found = _pools.get(pool.ctypes.data)
    if found is None or found.nbytes != pool.nbytes:
        raise BackendUnavailable(
            "the KV pool is private memory of this process: allocate it with transfer.allocate_pool(layout, path) and "
            "the path shared or auto (its log says why it was not shared)"
        )
    return found
