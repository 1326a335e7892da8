"""Tell Dynamo's KV router which blocks this worker's prefix cache holds."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Sequence
from typing import Any

log = logging.getLogger(__name__)

NO_LORA = 0


class KvEvents:
    """The engine's KvEventSink: publishes prefix cache changes.

    Hashes are signed 64-bit integers; a block holds exactly `block_size` tokens.

    What is held is remembered, because every new registration is a new worker to the router, which starts empty.
    Methods may be called from any thread.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._publisher: Any = None
        # hash -> (tokens, hash of the block before); a block is always younger than the one before it.
        self._held: dict[int, tuple[list[int], int | None]] = {}

    def attach(self, component: Any, worker_id: int) -> None:
        """Publish for a new registration from now on, and first of all what is held already.

        The publisher's arguments are given by name: 0.7.0 took (component, kv_block_size, dp_rank), 0.7.0.post1 takes
        (component, worker_id, kv_block_size, dp_rank); by position the wrong one is accepted and publishes nonsense.
        """
        from dynamo.llm import KvEventPublisher

        with self._lock:
            self._publisher = KvEventPublisher(component=component, worker_id=worker_id, kv_block_size=self._block_size)
            for block_hash, (tokens, parent) in self._held.items():
                self._publish_stored(tokens, [block_hash], parent)

    def stored(self, token_ids: Sequence[int], block_hashes: Sequence[int], parent_hash: int | None) -> None:
        """Note blocks that follow each other: `token_ids` of all of them, one hash a block."""
        with self._lock:
            parent = parent_hash
            for at, block_hash in enumerate(block_hashes):
                tokens = [int(token) for token in token_ids[at * self._block_size : (at + 1) * self._block_size]]
                self._held[block_hash] = (tokens, parent)
                parent = block_hash
            self._publish_stored(list(token_ids), list(block_hashes), parent_hash)

    def removed(self, block_hashes: Sequence[int]) -> None:
        """Note blocks that the prefix cache no longer holds."""
        with self._lock:
            for block_hash in block_hashes:
                self._held.pop(block_hash, None)
            if self._publisher is not None:
                self._publisher.publish_removed(next(self._numbers), list(block_hashes))

    def _publish_stored(self, token_ids: list[int], block_hashes: list[int], parent_hash: int | None) -> None:
        if self._publisher is not None:
            sizes = [self._block_size] * len(block_hashes)
            self._publisher.publish_stored(next(self._numbers), token_ids, sizes, block_hashes, NO_LORA, parent_hash)
