"""Tell Dynamo's KV router which blocks this worker's prefix cache holds."""

from __future__ import annotations

import itertools
import logging
from typing import Any

log = logging.getLogger(__name__)

NO_LORA = 0


class KvEvents:
    """Publishes prefix cache changes. Hashes are signed 64-bit integers; a block holds exactly `block_size` tokens.

    The publisher's arguments are given by name: 0.7.0 took (component, kv_block_size, dp_rank), 0.7.0.post1 takes
    (component, worker_id, kv_block_size, dp_rank), and by position the wrong one is accepted and publishes nonsense.
    """

    def __init__(self, component: Any, worker_id: int, block_size: int) -> None:
        from dynamo.llm import KvEventPublisher

        self._publisher = KvEventPublisher(component=component, worker_id=worker_id, kv_block_size=block_size)
        self._block_size = block_size
        self._numbers = itertools.count()

    def stored(self, token_ids: list[int], block_hashes: list[int], parent_hash: int | None) -> None:
        """Publish blocks that follow each other: `token_ids` of all of them, one hash a block."""
        sizes = [self._block_size] * len(block_hashes)
        self._publisher.publish_stored(next(self._numbers), token_ids, sizes, block_hashes, NO_LORA, parent_hash)

    def removed(self, block_hashes: list[int]) -> None:
        """Publish blocks that the prefix cache no longer holds."""
        self._publisher.publish_removed(next(self._numbers), block_hashes)
