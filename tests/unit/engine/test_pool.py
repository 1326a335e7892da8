from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdstack.engine.config import EngineError
from pdstack.engine.pool import BlockPool, PoolExhausted, block_hash, merged, new_pool_array

SIZE = 4


def publish_all(pool: BlockPool, blocks: list[int], tokens: list[int]) -> None:
    parent = None
    for at in range(len(tokens) // SIZE):
        parent = pool.publish(blocks[at], parent, tokens[at * SIZE : (at + 1) * SIZE])


def test_the_lowest_free_blocks_come_first() -> None:
    pool = BlockPool(8, SIZE, prefix_cache=False)
    assert pool.allocate(3) == [0, 1, 2]
    pool.release([1])
    assert pool.allocate(2) == [1, 3]


def test_exhaustion_takes_nothing() -> None:
    pool = BlockPool(4, SIZE, prefix_cache=True)
    pool.allocate(3)
    with pytest.raises(PoolExhausted, match="2 blocks wanted, 1 of 4 free"):
        pool.allocate(2)
    assert pool.available == 1


def test_releasing_twice_is_an_error() -> None:
    pool = BlockPool(4, SIZE, prefix_cache=True)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(EngineError, match="released more often"):
        pool.release(blocks)


def test_a_prefix_is_found_in_whole_blocks() -> None:
    pool = BlockPool(8, SIZE, prefix_cache=True)
    tokens = list(range(12))
    blocks = pool.allocate(3)
    publish_all(pool, blocks, tokens)
    pool.release(blocks)
    assert pool.used == 0 and pool.cached == 3 and pool.available == 8
    assert pool.match(tokens)[0] == blocks
    assert pool.match(tokens[:11])[0] == blocks[:2]
    assert pool.match([*tokens, 99])[0] == blocks
    assert pool.match([*tokens[:4], 99, *tokens[5:]])[0] == blocks[:1]
    assert pool.match([99, *tokens[1:]])[0] == []


def test_a_block_handed_out_anew_has_another_generation() -> None:
    pool = BlockPool(2, SIZE, prefix_cache=True)
    blocks = pool.allocate(2)
    first = pool.generations(blocks)
    publish_all(pool, blocks, list(range(8)))
    pool.release(blocks)
    pool.acquire(blocks)
    assert pool.generations(blocks) == first, "found in the cache: the same KV as before"
    pool.release(blocks)
    pool.allocate(1)
    assert pool.generations(blocks) == [first[0], first[1] + 1]


def test_what_builds_on_a_forgotten_block_is_forgotten_too() -> None:
    pool = BlockPool(8, SIZE, prefix_cache=True)
    blocks = pool.allocate(3)
    publish_all(pool, blocks, list(range(12)))
    other = pool.allocate(1)
    publish_all(pool, other, list(range(50, 54)))
    pool.events.clear()
    assert pool.forget([blocks[1]]) == 2
    assert pool.match(list(range(12)))[0] == blocks[:1]
    assert pool.match(list(range(50, 54)))[0] == other
    assert len(pool.events[0].block_hashes) == 2 and pool.used == 4


def test_the_end_of_a_prompt_is_evicted_before_its_beginning_and_both_are_reported() -> None:
    pool = BlockPool(3, SIZE, prefix_cache=True)
    tokens = list(range(12))
    blocks = pool.allocate(3)
    publish_all(pool, blocks, tokens)
    pool.release(blocks)
    pool.events.clear()
    pool.allocate(1)
    assert pool.match([*tokens, 99])[0] == blocks[:2]
    hashes = []
    for at in range(3):
        hashes.append(block_hash(hashes[-1] if hashes else None, tokens[at * SIZE : (at + 1) * SIZE]))
    assert [(event.kind, event.block_hashes) for event in pool.events] == [("removed", [hashes[2]])]


def test_stored_blocks_are_reported_with_what_they_follow() -> None:
    pool = BlockPool(4, SIZE, prefix_cache=True)
    publish_all(pool, pool.allocate(2), list(range(8)))
    (event,) = merged(pool.events)
    assert event.token_ids == list(range(8)) and event.parent_hash is None
    assert event.block_hashes == [block_hash(None, range(4)), block_hash(block_hash(None, range(4)), range(4, 8))]
    assert all(-(1 << 63) <= value < 1 << 63 for value in event.block_hashes)


def test_equal_hashes_of_different_tokens_do_not_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdstack.engine.pool.block_hash", lambda parent, tokens: 7)
    pool = BlockPool(4, SIZE, prefix_cache=True)
    (block,) = pool.allocate(1)
    pool.publish(block, None, [1, 2, 3, 4])
    assert pool.lookup(None, [1, 2, 3, 4]) == (block, 7)
    assert pool.lookup(None, [1, 2, 3, 5]) is None
    assert pool.lookup(3, [1, 2, 3, 4]) is None


def test_new_memory_is_zero_and_page_aligned() -> None:
    array = new_pool_array(3, 2, 16, 2, 8)
    assert array.shape == (3, 2, 2, 16, 2, 8) and not array.any() and array.ctypes.data % 4096 == 0


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share and give back blocks, in any order; the pool's books must agree with theirs."""

    TOTAL = 12

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.TOTAL, SIZE, prefix_cache=True)
        self.held: list[list[int]] = []
        self.known: dict[int, set[int]] = {}

    def references(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for blocks in self.held:
            for block in blocks:
                found[block] = found.get(block, 0) + 1
        return found

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def serve(self, tokens: list[int]) -> None:
        matched, parent = self.pool.match(tokens)
        assert len(matched) * SIZE <= len(tokens)
        self.pool.acquire(matched)
        fresh = -(-len(tokens) // SIZE) - len(matched)
        try:
            blocks = matched + self.pool.allocate(fresh)
        except PoolExhausted:
            assert self.TOTAL - len(set(self.references()) | set(matched)) < fresh
            self.pool.release(matched)
            return
        assert not set(blocks[len(matched) :]) & set(self.references()), "a block in use was given away"
        for at in range(len(matched), len(tokens) // SIZE):
            parent = self.pool.publish(blocks[at], parent, tokens[at * SIZE : (at + 1) * SIZE])
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(block=st.integers(0, TOTAL - 1))
    def doubt(self, block: int) -> None:
        known = set(self.pool._content)
        assert self.pool.forget([block]) == len(known) - len(self.pool._content)
        assert block not in self.pool._content
        kept = {content.hash for content in self.pool._content.values()}
        assert all(content.parent is None or content.parent in kept for content in self.pool._content.values())

    @rule()
    def clear(self) -> None:
        self.pool.clear_cache()

    @invariant()
    def books_agree(self) -> None:
        references = self.references()
        assert self.pool.used == len(references)
        assert self.pool.available == self.TOTAL - len(references)
        assert all(self.pool.references(block) == references.get(block, 0) for block in range(self.TOTAL))

    @invariant()
    def events_tell_what_is_cached(self) -> None:
        known: set[int] = set()
        for event in self.pool.events:
            if event.kind == "stored":
                assert event.parent_hash is None or event.parent_hash in known
                known |= set(event.block_hashes)
            else:
                assert set(event.block_hashes) <= known
                known -= set(event.block_hashes)
        assert known == set(self.pool._by_hash)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
