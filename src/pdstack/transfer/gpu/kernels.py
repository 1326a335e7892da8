"""The Triton kernels. Imported by `needs.gpu` only: importing this needs triton.

All memory is 8-byte words at raw addresses, as a pool of another process has an address and no tensor. Two words
(16 bytes) are one thread's load; addresses and strides are multiples of that, which the hints tell the compiler.
`mix` is `checksum.mix`; tests hold the two to the same numbers. Addresses are cast to 64 bits as the interpreter takes
small ones, of host memory, for 32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pdstack.transfer.gpu import checksum

_GOLDEN = tl.constexpr(checksum.GOLDEN)
_FIRST = tl.constexpr(checksum.FIRST)
_SECOND = tl.constexpr(checksum.SECOND)
_PAIR = tl.constexpr(checksum.PAIR_SHIFT)
_TOKEN = tl.constexpr(checksum.TOKEN_SHIFT)
_BLOCK = tl.constexpr(checksum.BLOCK_SHIFT)


@triton.jit
def _mix(words, positions):
    x = words.to(tl.uint64, bitcast=True) ^ (positions.to(tl.uint64, bitcast=True) * _GOLDEN)
    x = (x ^ (x >> 32)) * _FIRST
    x = (x ^ (x >> 29)) * _SECOND
    return (x ^ (x >> 32)).to(tl.int64, bitcast=True)


@triton.jit
def copy_extents(
    source, target, sources, targets, lengths, sums, unit, words, first, parts,
    COLS: tl.constexpr, COPY: tl.constexpr, SUM: tl.constexpr, LENGTHS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Copy extents of `words` words (or `lengths`), from source + sources[i] * unit to target + targets[i] * unit.

    A program takes COLS words of one extent, of `parts` such parts; programs that follow one another take the same
    extent's parts, as DRAM is faster when neighbours are read together. All words of a program lie at one base, so
    that a thread has almost no arithmetic. `unit` is in words.
    """
    number = tl.program_id(0)
    row = number // parts
    start = (number % parts) * COLS
    lane = tl.arange(0, COLS)
    size = tl.load(lengths + row).to(tl.int32) if LENGTHS else words
    inside = start + lane < size
    pool = source.to(tl.int64).to(tl.pointer_type(tl.int64)) + tl.multiple_of(tl.load(sources + row) * unit, 2) + start
    data = tl.load(pool + lane, mask=inside, other=0)
    if COPY:
        own = (
            target.to(tl.int64).to(tl.pointer_type(tl.int64)) + tl.multiple_of(tl.load(targets + row) * unit, 2) + start
        )
        tl.store(own + lane, data, mask=inside)
    if SUM:
        place = (row + first).to(tl.int64) if PLACES else row.to(tl.int64) * 0
        position = (place << _BLOCK) + start + lane
        tl.atomic_add(sums + row, tl.sum(tl.where(inside, _mix(data, position), 0), axis=0), sem="relaxed")


@triton.jit
def copy_kv(
    source, target, source_blocks, target_blocks, sums,
    first_tile, last_tile, token_from, token_to, pair_from, pairs, head_from, heads, group, parts,
    s_block, s_layer, s_kv, s_token, s_head, s_layer0, s_head0,
    t_block, t_layer, t_kv, t_token, t_head, t_layer0, t_head0,
    S_SIZE: tl.constexpr, T_SIZE: tl.constexpr, SPAN: tl.constexpr,
    TOKENS: tl.constexpr, COLS: tl.constexpr, WORDS: tl.constexpr, COPY: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Copy tokens between two strided layouts; strides in words. A head has WORDS words.

    A program takes TOKENS tokens of one layer's keys or values, which lie in one block on either side and in one
    checksum group, and COLS words of their heads. Programs go through the parts of a token's heads, SPAN tiles of
    tokens, layers and keys and values, and then the next SPAN tiles: what lies together is copied together.
    """
    number = tl.program_id(0)
    part = number % parts
    number = number // parts
    within = number % SPAN
    number = number // SPAN
    pair = number % pairs + pair_from
    tile = number // pairs * SPAN + within + first_tile
    # A tile past the end has no token inside and copies nothing; what it looks up is the last tile's.
    start = tl.minimum(tile, last_tile - 1) * TOKENS
    layer = pair // 2
    kv = pair % 2
    lane = tl.arange(0, TOKENS * COLS)
    token = lane // COLS
    col = part * COLS + lane % COLS
    head = col // WORDS
    word = col % WORDS
    inside = (tile * TOKENS + token >= token_from) & (tile * TOKENS + token < token_to) & (head < heads)
    # Strides times indices are counted with 64 bits from here on.
    zero = number.to(tl.int64) * 0
    base = tl.load(source_blocks + start // S_SIZE) * s_block + (zero + start % S_SIZE) * s_token
    base += (zero + layer - s_layer0) * s_layer + (zero + kv) * s_kv + (zero + head_from - s_head0) * s_head
    pool = source.to(tl.int64).to(tl.pointer_type(tl.int64)) + tl.multiple_of(base, 2)
    data = tl.load(pool + (token * s_token + head * s_head + word), mask=inside, other=0)
    if COPY:
        end = tl.load(target_blocks + start // T_SIZE) * t_block + (zero + start % T_SIZE) * t_token
        end += (zero + layer - t_layer0) * t_layer + (zero + kv) * t_kv + (zero + head_from - t_head0) * t_head
        own = target.to(tl.int64).to(tl.pointer_type(tl.int64)) + tl.multiple_of(end, 2)
        tl.store(own + (token * t_token + head * t_head + word), data, mask=inside)
    if SUM:
        position = (pair.to(tl.int64) << _PAIR) + ((start + token).to(tl.int64) << _TOKEN) + head_from * WORDS + col
        total = tl.sum(tl.where(inside, _mix(data, position), 0), axis=0)
        tl.atomic_add(sums + (start // group - token_from // group), total, sem="relaxed")
