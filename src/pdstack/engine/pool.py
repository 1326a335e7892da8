"""The paged KV pool: one array, blocks counted by reference, and a prefix cache over the unused ones.

Not thread-safe; the engine calls it under its lock.
"""

from __future__ import annotations

import hashlib
import heapq
import mmap
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdstack.engine.config import EngineError, KvEvent

__all__ = ["BlockPool", "NewPool", "PoolExhausted", "block_hash", "merged", "new_pool_array"]

# Makes the array of a pool: see :func:`new_pool_array`, whose arguments it takes.
NewPool = Callable[[int, int, int, int, int], npt.NDArray[np.float32]]


class PoolExhausted(EngineError):
    """Fewer blocks are free than were asked for. Nothing was taken."""


@dataclass(frozen=True, slots=True)
class _Cached:
    hash: int
    parent: int | None
    tokens: tuple[int, ...]


def block_hash(parent: int | None, tokens: Sequence[int]) -> int:
    """Signed 64-bit identity of a full block: its tokens and, through `parent`, all tokens before it."""
    digest = hashlib.blake2b(array("q", tokens).tobytes(), digest_size=8)
    digest.update(b"root" if parent is None else parent.to_bytes(8, "little", signed=True))
    return int.from_bytes(digest.digest(), "little", signed=True)


def new_pool_array(
    num_blocks: int, num_layers: int, block_size: int, num_kv_heads: int, head_dim: int
) -> npt.NDArray[np.float32]:
    """Zeroed float32 array (num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim), page-aligned.

    Private anonymous memory: a page takes RAM only once it is written, so a large, idle pool costs nothing.
    """
    shape = (num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim)
    size = int(np.prod(shape)) * 4
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype=np.float32).reshape(shape)


def merged(events: Sequence[KvEvent]) -> list[KvEvent]:
    """The same changes in fewer events: stored blocks that follow each other become one."""
    found: list[KvEvent] = []
    for event in events:
        last = found[-1] if found else None
        if last and event.kind == last.kind == "stored" and event.parent_hash == last.block_hashes[-1]:
            found[-1] = KvEvent(
                "stored",
                last.block_hashes + event.block_hashes,
                last.token_ids + event.token_ids,
                last.parent_hash,
            )
        else:
            found.append(event)
    return found


class BlockPool:
    """Hands out blocks, lowest number first so that a quiet pool stays small in RAM.

    A block is free, used (referenced at least once), or cached: unreferenced, but its content is known by hash and
    may be found again until it is evicted, least recently used first. Changes to the cache are appended to `events`.

    Each block has a generation, which grows whenever it is handed out anew: a block that still has the generation that
    it had at some moment has not been given to anybody else since.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.events: list[KvEvent] = []
        self._free = list(range(num_blocks))
        self._refs = [0] * num_blocks
        self._generations = [0] * num_blocks
        self._used = 0
        self._by_hash: dict[int, int] = {}
        self._content: dict[int, _Cached] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def used(self) -> int:
        """Blocks referenced by somebody."""
        return self._used

    @property
    def cached(self) -> int:
        """Unreferenced blocks with known content."""
        return len(self._unused)

    @property
    def available(self) -> int:
        """Blocks that `allocate` could give: free and cached ones."""
        return len(self._free) + len(self._unused)

    def references(self, block: int) -> int:
        """How often `block` is referenced."""
        return self._refs[block]

    def generations(self, blocks: Sequence[int]) -> list[int]:
        """How often each of `blocks` has been handed out anew; a block found in the cache is not."""
        return [self._generations[block] for block in blocks]

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one reference. Raises PoolExhausted and takes nothing if there are fewer."""
        if count > self.available:
            raise PoolExhausted(
                f"KV pool: {count} blocks wanted, {self.available} of {self.num_blocks} free; "
                "wait for requests to end or raise engine.kv_blocks"
            )
        removed: list[int] = []
        blocks: list[int] = []
        for _ in range(count):
            if self._free:
                block = heapq.heappop(self._free)
            else:
                block, _none = self._unused.popitem(last=False)
                content = self._content.pop(block)
                del self._by_hash[content.hash]
                removed.append(content.hash)
            self._refs[block] = 1
            self._generations[block] += 1
            blocks.append(block)
        self._used += count
        if removed:
            self.events.append(KvEvent("removed", removed))
        return blocks

    def acquire(self, blocks: Sequence[int]) -> None:
        """Add one reference to each block; a cached one becomes used."""
        for block in blocks:
            if self._refs[block] == 0:
                if block not in self._unused:
                    raise EngineError(f"KV pool: block {block} is free and can not be referenced")
                del self._unused[block]
                self._used += 1
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block. Unreferenced blocks become cached if their content is known, else free."""
        # Last block first: the end of a prompt then leaves the cache before the beginning it builds on.
        for block in reversed(blocks):
            refs = self._refs[block] - 1
            if refs < 0:
                raise EngineError(f"KV pool: block {block} released more often than it was taken")
            self._refs[block] = refs
            if refs == 0:
                self._used -= 1
                if block in self._content:
                    self._unused[block] = None
                else:
                    heapq.heappush(self._free, block)

    def lookup(self, parent: int | None, tokens: Sequence[int]) -> tuple[int, int] | None:
        """The (block, hash) that holds `tokens` after `parent`, or None. Compares tokens: a hash alone is no proof."""
        if not self.prefix_cache:
            return None
        key = block_hash(parent, tokens)
        block = self._by_hash.get(key)
        if block is None:
            return None
        content = self._content[block]
        if content.parent != parent or content.tokens != tuple(tokens):
            return None
        return block, key

    def match(self, tokens: Sequence[int]) -> tuple[list[int], int | None]:
        """Longest cached prefix of `tokens` in whole blocks.

        Returns the blocks (not referenced yet) and the hash of the last one.
        """
        size = self.block_size
        blocks: list[int] = []
        parent: int | None = None
        for start in range(0, len(tokens) // size * size, size):
            found = self.lookup(parent, tokens[start : start + size])
            if found is None:
                break
            blocks.append(found[0])
            parent = found[1]
        return blocks, parent

    def publish(self, block: int, parent: int | None, tokens: Sequence[int]) -> int:
        """Make a full, computed block findable; returns its hash. A block with the same content stays the known one."""
        key = block_hash(parent, tokens)
        if self.prefix_cache and key not in self._by_hash and block not in self._content:
            self._by_hash[key] = block
            self._content[block] = _Cached(key, parent, tuple(tokens))
            self.events.append(KvEvent("stored", [key], list(tokens), parent))
        return key

    def forget(self, blocks: Sequence[int]) -> int:
        """Forget what `blocks` hold, and what was found to follow on it: it may have been computed from it.

        Used blocks stay used. Returns how many blocks were forgotten.
        """
        gone = {self._content[block].hash for block in blocks if block in self._content}
        grown = True
        while grown:
            found = {c.hash for c in self._content.values() if c.parent in gone} - gone
            gone |= found
            grown = bool(found)
        for key in gone:
            block = self._by_hash.pop(key)
            del self._content[block]
            if block in self._unused:
                del self._unused[block]
                heapq.heappush(self._free, block)
        if gone:
            self.events.append(KvEvent("removed", sorted(gone)))
        return len(gone)

    def clear_cache(self) -> int:
        """Forget all known content; used blocks stay used. Returns how many blocks were forgotten."""
        count = len(self._content)
        if count:
            self.events.append(KvEvent("removed", [c.hash for c in self._content.values()]))
        for block in self._unused:
            heapq.heappush(self._free, block)
        self._unused.clear()
        self._content.clear()
        self._by_hash.clear()
        return count
