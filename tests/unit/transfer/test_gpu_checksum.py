"""The checksum's guarantees, on its reference: what is certain is tried with many inputs, what is likely as well."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdstack.transfer.gpu import checksum

STILL = settings(derandomize=True, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def pool(seed: int, blocks: int = 6, words: int = 16) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (blocks, words * 8), dtype=np.uint8)


def by_hand(words: list[int], place: int) -> int:
    """The definition in Python's own integers."""
    total = 0
    for index, word in enumerate(words):
        x = word ^ (((place << 32) + index) * 0x9E3779B97F4A7C15 % 2**64)
        x = (x ^ (x >> 32)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 29)) * 0x94D049BB133111EB % 2**64
        total += x ^ (x >> 32)
    return total % 2**64


@STILL
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.integers(0, 2**31))
def test_the_sum_is_the_one_defined(words: list[int], place: int) -> None:
    data = np.array([words], dtype=np.uint64).view(np.uint8)
    assert int(checksum.block_sums(data, [0], place)[0]) == by_hand(words, place)


def test_the_number_is_the_same_in_every_release() -> None:
    """Two workers of different releases compare them: change VERSION of the export when this changes."""
    data = np.arange(4096, dtype=np.uint64).view(np.uint8).reshape(2, -1)
    assert [hex(value) for value in checksum.block_sums(data, [1, 0])] == ["0xeda4d8f504ba7d1a", "0xbd2f1a6b0f2f866c"]


@STILL
@given(SEEDS, st.integers(0, 5), st.integers(0, 127), st.integers(1, 255))
def test_every_change_of_a_byte_changes_its_block_alone(seed: int, block: int, byte: int, flips: int) -> None:
    data = pool(seed)
    before = checksum.block_sums(data, range(6))
    data[block, byte] ^= flips
    assert list(np.flatnonzero(before != checksum.block_sums(data, range(6)))) == [block]


def test_every_single_bit_is_seen_in_zeros_ones_and_noise() -> None:
    for block in (np.zeros(64, np.uint8), np.full(64, 255, np.uint8), pool(1, 1, 8)[0]):
        damaged = np.unpackbits(block)[None, :] ^ np.eye(512, dtype=np.uint8)
        changed = np.packbits(damaged, axis=1)
        sums = np.array([checksum.block_sums(one[None, :], [0])[0] for one in changed])
        assert checksum.block_sums(block[None, :], [0])[0] not in sums
        assert len(set(sums.tolist())) == 512


@STILL
@given(SEEDS, st.integers(0, 15), st.integers(0, 15))
def test_swapped_words_are_seen(seed: int, one: int, other: int) -> None:
    words = pool(seed, 1).view(np.uint64)
    swapped = words.copy()
    swapped[0, [one, other]] = words[0, [other, one]]
    same = bool((words == swapped).all())
    assert (checksum.block_sums(words, [0]) == checksum.block_sums(swapped, [0]))[0] == same


@STILL
@given(SEEDS, st.permutations(range(6)))
def test_swapped_blocks_are_seen_and_their_numbers_do_not_matter(seed: int, order: list[int]) -> None:
    data = pool(seed)
    whole = checksum.block_sums(data, range(6))
    assert (checksum.combine(whole) == checksum.combine(checksum.block_sums(data, order))) == (order == sorted(order))
    # The same blocks at other numbers of another pool, in the same order.
    assert np.array_equal(checksum.block_sums(data[order], np.argsort(order)), whole)


@STILL
@given(SEEDS, st.permutations(range(6)))
def test_a_block_for_itself_has_one_checksum_wherever_it_is_named(seed: int, order: list[int]) -> None:
    data = pool(seed)
    alone = checksum.block_sums(data, range(6), None)
    assert np.array_equal(checksum.block_sums(data, order, None), alone[order])
    assert np.array_equal(alone[:1], checksum.block_sums(data, [0]))
    assert len(np.unique(np.concatenate((alone, checksum.block_sums(data, range(1, 6), 1))))) == 11


@STILL
@given(SEEDS, st.integers(0, 127), st.integers(1, 128))
def test_zeroed_and_stale_runs_are_seen(seed: int, start: int, length: int) -> None:
    data = pool(seed, 2) | 1
    for run in (0, data[1, start : start + length] ^ 2):
        damaged = data.copy()
        damaged[0, start : start + length] = run
        assert checksum.block_sums(damaged, [0]) != checksum.block_sums(data, [0])


@STILL
@given(SEEDS, st.integers(0, 6))
def test_parts_add_up_to_the_whole(seed: int, at: int) -> None:
    data = pool(seed)
    parts = (checksum.block_sums(data, range(at)), checksum.block_sums(data, range(at, 6), at))
    assert checksum.combine(*parts) == checksum.combine(checksum.block_sums(data, range(6)))


def test_positions_of_kv_are_all_different() -> None:
    grid = np.meshgrid(range(3), range(2), range(5), range(7), indexing="ij")
    positions = checksum.kv_position(*grid)
    assert len(np.unique(positions)) == positions.size == 210


def test_a_block_that_is_no_whole_number_of_words_is_refused() -> None:
    with pytest.raises(ValueError, match="12 bytes, wanted a multiple of 8"):
        checksum.block_sums(np.zeros((2, 12), np.uint8), [0])
