"""The end-to-end check: what decode has in its blocks is what prefill had in its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash


def checksum_blocks(pool: npt.NDArray[np.generic], blocks: Sequence[int]) -> str:
    """XXH3-128 over the bytes of `blocks` of `pool` in this order, as 32 hex digits.

    One hash over all blocks, not one each: it costs the same time and keeps a ticket small. Consecutive blocks are
    hashed in one call; the interpreter lock is free meanwhile.
    """
    flat: Any = pool.view(np.uint8).reshape(pool.shape[0], -1)
    digest = xxhash.xxh3_128()
    start = 0
    for index in range(1, len(blocks) + 1):
        if index == len(blocks) or blocks[index] != blocks[index - 1] + 1:
            digest.update(flat[blocks[start] : blocks[index - 1] + 1].reshape(-1).data)
            start = index
    return digest.hexdigest()
