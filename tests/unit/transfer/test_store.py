"""Hashes of blocks: of their bytes, wherever they lie, and the same however the copy is cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pdstack.transfer import KVLayout, allocate_pool
from pdstack.transfer.store import HASH_UNIT, HostStore

SMALL = KVLayout(num_blocks=8, num_layers=2, block_size=4, num_kv_heads=2, head_dim=4)
# Two whole pieces and a shorter one.
LONG = KVLayout(num_blocks=4, num_layers=5, block_size=16, num_kv_heads=8, head_dim=128)


def filled(layout: KVLayout) -> Any:
    pool: Any = allocate_pool(layout)
    pool[...] = np.random.default_rng(1).random(layout.shape, np.float32)
    return pool


@given(st.lists(st.integers(0, 7), min_size=1, max_size=12))
def test_a_hash_is_of_a_blocks_bytes_wherever_it_lies(blocks: list[int]) -> None:
    pool = filled(SMALL)
    copy: Any = allocate_pool(replace(SMALL, num_blocks=len(blocks)))
    copy[...] = pool[blocks]
    there = HostStore(replace(SMALL, num_blocks=len(blocks)), copy).hashes(range(len(blocks)))
    here = HostStore(SMALL, pool).hashes(blocks)
    assert here.tolist() == there.tolist()
    assert here.tolist() == [xxhash.xxh3_64_intdigest(pool[block].tobytes()) for block in blocks]


def test_a_long_block_is_hashed_in_pieces() -> None:
    pool = filled(LONG)
    assert LONG.block_bytes % HASH_UNIT
    assert LONG.block_bytes > 2 * HASH_UNIT
    data = pool[2].tobytes()
    pieces = [xxhash.xxh3_64_intdigest(data[at : at + HASH_UNIT]) for at in range(0, len(data), HASH_UNIT)]
    wanted = xxhash.xxh3_64_intdigest(b"".join(piece.to_bytes(8, "little") for piece in pieces))
    assert HostStore(LONG, pool).hashes([0, 2]).tolist()[1] == wanted


def test_a_hash_notices_one_bit() -> None:
    for layout in (SMALL, LONG):
        pool = filled(layout)
        store = HostStore(layout, pool)
        before = store.hashes([0, 1, 2]).tolist()
        pool[1].view(np.uint32).reshape(-1)[-1] ^= 1
        after = store.hashes([0, 1, 2]).tolist()
        assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
