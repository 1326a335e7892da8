"""Where the engine's KV pool lies: where the transfer's path wants it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pdstack.engine.pool import NewPool, new_pool_array
from pdstack.transfer import KVLayout, allocate_pool
from pdstack.worker.config import WorkerConfig


def pool_maker(config: WorkerConfig) -> NewPool:
    """What makes the pool of this worker. Prefill's depends on the path; what decode reads into may be any memory.

    What it gives raises :class:`BackendUnavailable` if the path is shared and the kernel has no sealed memory.
    """
    if config.transfer is None or config.transfer.path == "backend" or config.role != "prefill":
        return new_pool_array
    path = config.transfer.path

    def allocate(
        num_blocks: int, num_layers: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> npt.NDArray[np.float32]:
        layout = KVLayout(num_blocks, num_layers, block_size, num_kv_heads, head_dim)
        return allocate_pool(layout, path).view(np.float32)

    return allocate
