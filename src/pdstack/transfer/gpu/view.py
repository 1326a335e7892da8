"""Where the KV of a sequence lies in a pool, for any layout that strides can describe, and the parts two pools share.

A :class:`KVView` says, in bytes, how far apart blocks, layers, key and value, tokens and heads are. That covers
block-major and layer-major pools, tokens before heads or after them, any block size, and the slices of the model that
a rank of tensor or pipeline parallelism holds. Only the `head_dim` elements of a head must lie together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pdstack.transfer.errors import LayoutMismatch
from pdstack.transfer.gpu import checksum
from pdstack.transfer.layout import KVLayout
from pdstack.transfer.plan import LAYER_MAJOR, Shard

# What one thread loads at once; a head's elements and every stride are whole numbers of it.
ALIGN = 16


@dataclass(frozen=True)
class KVView:
    """A pool of `num_blocks` blocks of `block_size` tokens, with the model's layers and heads from `first_*` on.

    Strides are bytes. `head_bytes` is head_dim * itemsize.
    """

    num_blocks: int
    block_size: int
    num_layers: int
    num_heads: int
    head_bytes: int
    block_stride: int
    layer_stride: int
    kv_stride: int
    token_stride: int
    head_stride: int
    first_layer: int = 0
    first_head: int = 0

    def __post_init__(self) -> None:
        for name in ("head_bytes", "block_stride", "layer_stride", "kv_stride", "token_stride", "head_stride"):
            value = getattr(self, name)
            if value < 1 or value % ALIGN:
                raise LayoutMismatch(
                    f"KVView.{name} is {value} bytes, wanted a positive multiple of {ALIGN}: the kernel copies {ALIGN} "
                    "bytes a thread; pad head_dim"
                )
        for name in ("num_blocks", "block_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise LayoutMismatch(f"KVView.{name} is {getattr(self, name)}, wanted at least 1")

    @property
    def nbytes(self) -> int:
        """Bytes from the pool's start to the end of the last element."""
        return (
            (self.num_blocks - 1) * self.block_stride + (self.num_layers - 1) * self.layer_stride + self.kv_stride
            + (self.block_size - 1) * self.token_stride + (self.num_heads - 1) * self.head_stride + self.head_bytes
        )  # fmt: skip

    def shard(self, first_layer: int, first_head: int) -> KVView:
        """Return the same pool as the one of a rank whose layers and heads start there."""
        return replace(self, first_layer=first_layer, first_head=first_head)


def of(shard: Shard) -> KVView:
    """Return the view of a pool as transfer plans describe it: any order of its axes, any slice of the model."""
    step = shard.strides()
    layout = shard.layout
    return KVView(
        layout.num_blocks, layout.block_size, layout.num_layers, layout.num_kv_heads, shard.head_bytes,
        step["block"], step["layer"], step["kv"], step["token"], step["head"], shard.first_layer, shard.first_head,
    )  # fmt: skip


def block_major(layout: KVLayout) -> KVView:
    """Return the view of pdstack's own pool: block, layer, kv, token, head, dim."""
    return of(Shard(layout))


def layer_major(layout: KVLayout, *, heads_first: bool = False) -> KVView:
    """Return the view of a pool with one tensor a layer: layer, kv, block, token, head, dim (or head, token, dim)."""
    return of(Shard(layout, ("layer", "kv", "block", "head", "token") if heads_first else LAYER_MAJOR))


@dataclass(frozen=True)
class Region:
    """A part of a sequence's KV: half-open ranges of the model's layers, of tokens and of the model's heads."""

    layers: tuple[int, int]
    tokens: tuple[int, int]
    heads: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(layers, 2, tokens, heads)."""
        (l0, l1), (t0, t1), (h0, h1) = self.layers, self.tokens, self.heads
        return (l1 - l0, 2, t1 - t0, h1 - h0)


def shared(source: KVView, target: KVView, tokens: tuple[int, int]) -> Region:
    """Return what both views hold of these tokens. Raises :class:`LayoutMismatch` if that is nothing."""
    if source.head_bytes != target.head_bytes:
        raise LayoutMismatch(
            f"a head has {source.head_bytes} bytes at the source, {target.head_bytes} at the target: head_dim or the "
            "KV data type differ, and this copy does not convert; give both workers the same model and kv_cache_dtype"
        )
    layers = _overlap(source.first_layer, source.num_layers, target.first_layer, target.num_layers)
    heads = _overlap(source.first_head, source.num_heads, target.first_head, target.num_heads)
    if layers is None or heads is None:
        what = "layer" if layers is None else "head"
        raise LayoutMismatch(
            f"the two workers share no {what} of the model: source has {what}s from "
            f"{getattr(source, 'first_' + what)}, target from {getattr(target, 'first_' + what)}; ask another rank"
        )
    return Region(layers, tokens, heads)


def _overlap(first: int, count: int, other: int, others: int) -> tuple[int, int] | None:
    low, high = max(first, other), min(first + count, other + others)
    return (low, high) if low < high else None


def check(
    view: KVView, blocks: npt.NDArray[np.int64], region: Region, pool_bytes: int, what: str, *, unique: bool
) -> None:
    """Raise :class:`LayoutMismatch` unless the region lies in the view, its tokens in `blocks` and those in the pool.

    With `unique` a block must not be named twice: two tokens would be written to the same place.
    """
    (l0, l1), (t0, t1), (h0, h1) = region.layers, region.tokens, region.heads
    for name, low, high, first, count in (
        ("layers", l0, l1, view.first_layer, view.num_layers),
        ("heads", h0, h1, view.first_head, view.num_heads),
        ("tokens", t0, t1, 0, len(blocks) * view.block_size),
    ):
        if not first <= low < high <= first + count:
            raise LayoutMismatch(
                f"{name} {low} to {high - 1} are wanted, the {what} holds {name} {first} to {first + count - 1}: "
                + ("name more blocks" if name == "tokens" else "ask the rank that holds them")
            )
    if view.nbytes > pool_bytes:
        raise LayoutMismatch(
            f"the {what} view covers {view.nbytes} bytes, its pool has {pool_bytes}: the view is of another pool"
        )
    if l1 * 2 > checksum.MAX_PAIRS or t1 > checksum.MAX_TOKENS or h1 * view.head_bytes // 8 > checksum.MAX_ROW_WORDS:
        raise LayoutMismatch(f"layer {l1}, token {t1} or head {h1} is beyond what a checksum's position can hold")
    check_blocks(blocks, view.num_blocks, what, unique=unique)


def check_blocks(blocks: npt.NDArray[np.int64], num_blocks: int, what: str, *, unique: bool) -> None:
    """Raise :class:`LayoutMismatch` unless all are numbers of blocks in the pool and, if `unique`, no two are equal."""
    if not len(blocks):
        return
    low, high = int(blocks.min()), int(blocks.max())
    if low < 0 or high >= num_blocks:
        raise LayoutMismatch(
            f"{what} block {low if low < 0 else high} is outside the pool, which has blocks 0 to {num_blocks - 1}"
        )
    if unique:
        named = np.zeros(num_blocks, dtype=bool)
        named[blocks] = True
        if np.count_nonzero(named) != len(blocks):
            raise LayoutMismatch(f"a {what} block is named twice: two tokens would be written to the same place")


def offsets(view: KVView, blocks: npt.ArrayLike, region: Region) -> npt.NDArray[np.int64]:
    """Return int64 of `region.shape`: the byte offset in the pool of each head's `head_bytes` bytes.

    This is the reference of the kernel's arithmetic.
    """
    table = np.asarray(blocks, dtype=np.int64)
    layer, kv, token, head = np.meshgrid(
        np.arange(*region.layers), np.arange(2), np.arange(*region.tokens), np.arange(*region.heads),
        indexing="ij", sparse=True,
    )  # fmt: skip
    result: npt.NDArray[np.int64] = (
        table[token // view.block_size] * view.block_stride
        + (token % view.block_size) * view.token_stride
        + (layer - view.first_layer) * view.layer_stride
        + kv * view.kv_stride
        + (head - view.first_head) * view.head_stride
    )
    return result


def read_heads(
    pool: npt.NDArray[np.uint8], view: KVView, blocks: npt.ArrayLike, region: Region
) -> npt.NDArray[np.uint64]:
    """Return uint64 of `region.shape` + (words of a head,): the region's KV in logical order, whatever the layout."""
    starts = offsets(view, blocks, region)
    words = pool.view(np.uint64)
    heads: npt.NDArray[np.uint64] = words[(starts // 8)[..., None] + np.arange(view.head_bytes // 8)]
    return heads


def write_heads(
    pool: npt.NDArray[np.uint8], view: KVView, blocks: npt.ArrayLike, region: Region, heads: npt.NDArray[np.uint64]
) -> None:
    """Write what :func:`read_heads` returned into `pool`, in that pool's layout: the reference of the copy."""
    starts = offsets(view, blocks, region)
    pool.view(np.uint64)[(starts // 8)[..., None] + np.arange(view.head_bytes // 8)] = heads


def kv_sums(heads: npt.NDArray[np.uint64], region: Region, group: int) -> npt.NDArray[np.uint64]:
    """Return uint64[n]: the checksum of every `group` tokens of the sequence that the region touches.

    Groups are counted from token 0 of the sequence, so their numbers do not depend on a pool's block size.
    """
    words = heads.shape[-1]
    layer, kv, token, word = np.meshgrid(
        np.arange(*region.layers), np.arange(2), np.arange(*region.tokens),
        np.arange(region.heads[0] * words, region.heads[1] * words), indexing="ij", sparse=True,
    )  # fmt: skip
    flat = heads.reshape(*region.shape[:3], -1)
    tokens = checksum.mix(flat, checksum.kv_position(layer, kv, token, word)).sum(axis=(0, 1, 3), dtype=np.uint64)
    place = np.arange(*region.tokens) // group - region.tokens[0] // group
    sums = np.zeros(int(place[-1]) + 1, dtype=np.uint64)
    np.add.at(sums, place, tokens)
    return sums


def cut(
    source: npt.NDArray[np.int64], target: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64], piece: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cut extents (byte offsets and lengths) into pieces of at most `piece` bytes: equal work for a GPU's programs."""
    counts = -(-nbytes // piece)
    whole = np.repeat(np.arange(len(nbytes)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    within = (np.arange(len(whole)) - first) * piece
    return source[whole] + within, target[whole] + within, np.minimum(nbytes[whole] - within, piece)
