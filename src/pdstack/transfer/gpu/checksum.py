"""The 64-bit checksum of KV blocks: its definition, what it guarantees, and the reference that runs on a CPU.

The KV is seen as 8-byte words. Each word `d` has a logical position `p`, a 64-bit number that says which piece of
the KV it is, not where it lies. A block's checksum is

    sum over its words of  mix(d XOR p * GOLDEN)   modulo 2^64

where `mix` is a bijection of 64-bit numbers (two multiplications and three shifts, in the manner of MurmurHash3's
finaliser). The sum makes it independent of the order in which a GPU's threads come by; the position makes it depend
on the order of the words.

Guaranteed, not only likely:

- Any change within one aligned 8-byte word is detected: flipped bits, one or all 64 of them, a zeroed word. (For one
  position the map from word to summand is a bijection, and the other summands stay.)
- The checksum of a whole is the sum of its parts' checksums modulo 2^64. Two workers that cut the same KV into blocks,
  layers or heads in different ways get sums that can be compared after adding.
- The same KV gives the same number in every layout, as positions are logical (:func:`kv_position`).

Detected but with a probability of about 2^-64, if the error was not made with knowledge of the function: changes of
several words, that is swapped words or blocks, shifted, repeated, stale or zeroed runs, a torn block.

Not promised: it is no message authentication code. Somebody who chooses the bytes can make a collision.

What a copy's checksum proves: it is taken from the bytes that the kernel read. If it equals the exporter's, the right
blocks were read, whole and not yet reused. That the write into our own pool arrived is the memory's promise (ECC);
`copy.sum_blocks` of the target proves that too, for one more pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

WORD = 8
GOLDEN = 0x9E3779B97F4A7C15
FIRST = 0xBF58476D1CE4E5B9
SECOND = 0x94D049BB133111EB
# A position of KV: bits 48 up (2 * layer + kv), bits 20 to 47 token, bits 0 to 19 word of the token's heads.
PAIR_SHIFT = 48
TOKEN_SHIFT = 20
# A position in an opaque block: bits 32 up the block's place in the list, below it the word.
BLOCK_SHIFT = 32
# How the two ends of a transfer name the checksum of a block for itself (place 0 for each), by which they compare.
NAME = "gpu-64"

MAX_PAIRS = 1 << (64 - PAIR_SHIFT)
MAX_TOKENS = 1 << (PAIR_SHIFT - TOKEN_SHIFT)
MAX_ROW_WORDS = 1 << TOKEN_SHIFT


def mix(words: Words, positions: Words) -> Words:
    """Return each word's summand. `words` and `positions` broadcast against each other."""
    x: Words = words ^ (positions * np.uint64(GOLDEN))
    x = (x ^ (x >> np.uint64(32))) * np.uint64(FIRST)
    x = (x ^ (x >> np.uint64(29))) * np.uint64(SECOND)
    return x ^ (x >> np.uint64(32))


def block_sums(pool: npt.NDArray[Any], blocks: npt.ArrayLike, first: int | None = 0) -> Words:
    """Return uint64[n]: the checksums of `blocks` of `pool` (axis 0), the i-th of them at place `first + i`.

    A block is opaque here: both sides must have the same layout. The place, and not the block's number in the pool,
    is in the position, so both sides agree though their block numbers differ, and a swap of two blocks is seen even in
    the sum of all. With `first` None each block is at place 0, so that its checksum says what is in it and no more:
    then the checksums must be compared one by one, each with its own.
    """
    wanted = np.asarray(blocks, dtype=np.int64)
    flat = np.ascontiguousarray(pool).view(np.uint8).reshape(len(pool), -1)
    if flat.shape[1] % WORD:
        raise ValueError(f"a block has {flat.shape[1]} bytes, wanted a multiple of {WORD}")
    words = flat[wanted].view(np.uint64)
    place = np.zeros(len(wanted), np.uint64) if first is None else np.arange(len(wanted), dtype=np.uint64)
    place = (place + np.uint64(first or 0)) << np.uint64(BLOCK_SHIFT)
    positions = place[:, None] + np.arange(words.shape[1], dtype=np.uint64)[None, :]
    sums: Words = mix(words, positions).sum(axis=1, dtype=np.uint64)
    return sums


def kv_position(layer: Any, kv: Any, token: Any, word: Any) -> Words:
    """Return the positions of words of KV: arrays or numbers that broadcast.

    `layer` is the model's layer, `kv` 0 for key and 1 for value, `token` its place in the sequence, `word` the 8-byte
    word within all of the model's KV heads of that token: head * words of a head + word of the head.
    """
    layer, kv, token, word = (np.asarray(part).astype(np.uint64) for part in (layer, kv, token, word))
    pair = layer * np.uint64(2) + kv
    result: Words = (pair << np.uint64(PAIR_SHIFT)) | (token << np.uint64(TOKEN_SHIFT)) | word
    return result


def combine(*sums: npt.ArrayLike) -> int:
    """Add checksums modulo 2^64: the checksum of everything that they cover."""
    return sum(int(np.asarray(part, dtype=np.uint64).sum(dtype=np.uint64)) for part in sums) % (1 << 64)
