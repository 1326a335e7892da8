"""Copies of KV blocks on a GPU: from a peer's pool, between layouts, and through one staging run for another host.

A pool here is :class:`Pool`: an address and a size. Everything is queued on torch's current stream and returns at
once; indices are int64 CUDA tensors, and bad ones are refused on the host where the caller gives numpy arrays
(:func:`table`). The law of the package holds by the stream's order: only our own process runs the kernel, so when the
stream is synchronised, nothing writes our blocks any more, whatever the peer does. Nothing can stop a started kernel,
but its length is bounded: it waits for nobody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pdstack.transfer.errors import LayoutMismatch
from pdstack.transfer.gpu import view as views
from pdstack.transfer.gpu.board import Board
from pdstack.transfer.gpu.needs import gpu
from pdstack.transfer.gpu.view import KVView, Region

# Bytes of one program, and of one warp of it: four loads of 16 bytes a thread. On an H100 programs of 8 to 32 KiB do
# equally well (benchmarks/gpu_paths.py --tune).
TILE = 16384
WARP = 2048
# Extents of any lengths are cut to this many bytes.
PIECE = 16384
# Bytes that the kernels count with 32 bits, in words.
_REACH = 8 << 31


class Pool(NamedTuple):
    """Device memory: `address` as this process sees it, `nbytes` from there."""

    address: int
    nbytes: int


def pool_of(tensor: Any) -> Pool:
    """Return a tensor's memory. Raises :class:`LayoutMismatch` if it is not one aligned run."""
    pool = Pool(int(tensor.data_ptr()), int(tensor.numel() * tensor.element_size()))
    if not tensor.is_contiguous() or pool.address % views.ALIGN:
        raise LayoutMismatch(
            f"the KV pool tensor must be contiguous and start at a multiple of {views.ALIGN} bytes, found strides "
            f"{tuple(tensor.stride())} at {pool.address:#x}: allocate it as one torch.empty and pass that"
        )
    return pool


@dataclass(frozen=True)
class Table:
    """Block numbers on the device, int64[n], all of them below `limit`: the kernel itself checks nothing."""

    numbers: Any
    limit: int

    def __len__(self) -> int:
        return len(self.numbers)


def table(
    blocks: npt.ArrayLike, num_blocks: int, what: str, *, unique: bool = False, board: Board | None = None
) -> Table:
    """Check block numbers of a pool of `num_blocks` and put them on the device. Raises :class:`LayoutMismatch`.

    Pass `unique` for blocks that are written: two copies would race for one that is named twice. With a `board` no
    memory is allocated, and the table is good until the board's next `begin`.
    """
    wanted = np.array(blocks, dtype=np.int64)
    views.check_blocks(wanted, num_blocks, what, unique=unique)
    return Table(_upload(wanted) if board is None else board.upload(wanted), num_blocks)


def _places(count: int) -> Table:
    needs = gpu()
    return Table(needs.torch.arange(count, device=needs.device), count)


def _upload(numbers: npt.NDArray[np.int64]) -> Any:
    """Queue the numbers' copy to the GPU, from pinned memory: from other memory the host would wait for the stream."""
    needs = gpu()
    there = needs.torch.from_numpy(numbers)
    return there if needs.device == "cpu" else there.pin_memory().to(needs.device, non_blocking=True)


def copy_blocks(
    source: Pool,
    target: Pool,
    sources: Table,
    targets: Table,
    block_bytes: int,
    *,
    checksum: bool,
    first: int | None = 0,
) -> Any:
    """Copy block `sources[i]` to `targets[i]`; return int64[n] checksums (:func:`checksum.block_sums`), or None.

    `first` is the place in the request of the list's first block; with None each block is checked for itself. Raises
    :class:`LayoutMismatch` if a table is of a pool larger than the one given.
    """
    _inside(source, sources, block_bytes, "source")
    _inside(target, targets, block_bytes, "target")
    return _extents(
        source, target, sources.numbers, targets.numbers, None, block_bytes, block_bytes, first,
        copy=True, checksum=checksum,
    )  # fmt: skip


def _inside(pool: Pool, blocks: Table, block_bytes: int, what: str) -> None:
    if blocks.limit * block_bytes > pool.nbytes:
        raise LayoutMismatch(
            f"the {what} blocks are of a pool of {blocks.limit} blocks of {block_bytes} bytes, the {what} pool has "
            f"{pool.nbytes} bytes: make the table for this pool"
        )


def sum_blocks(pool: Pool, blocks: Table, block_bytes: int, *, first: int | None = 0) -> Any:
    """Return int64[n]: the checksums of blocks where they lie. What prefill puts into its ticket."""
    _inside(pool, blocks, block_bytes, "summed")
    numbers = blocks.numbers
    return _extents(pool, pool, numbers, numbers, None, block_bytes, block_bytes, first, copy=False, checksum=True)


def copy_extents(
    source: Pool, target: Pool, sources: npt.ArrayLike, targets: npt.ArrayLike, nbytes: npt.ArrayLike
) -> None:
    """Copy runs of any length: byte offsets in both pools and lengths, multiples of 16 (a transfer plan's arrays).

    Raises :class:`LayoutMismatch` for a run outside the pools. That no target byte comes twice is the plan's promise.
    """
    pieces = [np.asarray(part, dtype=np.int64) for part in (sources, targets, nbytes)]
    if any(((part < 0) | (part % views.ALIGN != 0)).any() for part in pieces):
        raise LayoutMismatch(
            f"offsets and lengths of GPU extents must be multiples of {views.ALIGN} bytes, and not negative"
        )
    for start, pool, what in ((pieces[0], source, "source"), (pieces[1], target, "target")):
        if len(start) and int((start + pieces[2]).max()) > pool.nbytes:
            raise LayoutMismatch(
                f"an extent ends at {int((start + pieces[2]).max())}, the {what} pool has {pool.nbytes} bytes"
            )
    if not pieces[2].sum():
        return
    s, t, n = (_upload(part // 8) for part in views.cut(pieces[0], pieces[1], pieces[2], PIECE))
    _extents(source, target, s, t, n, PIECE, 8, 0, copy=True, checksum=False)


def gather(pool: Pool, blocks: Table, block_bytes: int, staging: Pool, *, checksum: bool, first: int | None = 0) -> Any:
    """Collect blocks into one run at the start of `staging`, which then leaves this host as one message."""
    _room(staging, len(blocks), block_bytes)
    return copy_blocks(pool, staging, blocks, _places(len(blocks)), block_bytes, checksum=checksum, first=first)


def scatter(
    staging: Pool, pool: Pool, blocks: Table, block_bytes: int, *, checksum: bool, first: int | None = 0
) -> Any:
    """Spread the run at the start of `staging` over `blocks`; the checksums are of what arrived in staging."""
    _room(staging, len(blocks), block_bytes)
    return copy_blocks(staging, pool, _places(len(blocks)), blocks, block_bytes, checksum=checksum, first=first)


def _room(staging: Pool, count: int, block_bytes: int) -> None:
    if count * block_bytes > staging.nbytes:
        raise LayoutMismatch(
            f"{count} blocks of {block_bytes} bytes do not fit into a staging run of {staging.nbytes} bytes: "
            "move them in several rounds or allocate more"
        )


def _extents(
    source: Pool, target: Pool, sources: Any, targets: Any, lengths: Any, extent: int, unit: int, first: int | None,
    *, copy: bool, checksum: bool,
) -> Any:  # fmt: skip
    needs = gpu()
    if extent % views.ALIGN or extent < views.ALIGN:
        raise LayoutMismatch(f"a block has {extent} bytes, wanted a multiple of {views.ALIGN}: pad head_dim")
    if extent >= _REACH:
        raise LayoutMismatch(f"a block has {extent} bytes, wanted less than {_REACH}: pass it as smaller blocks")
    if len(sources) != len(targets):
        raise LayoutMismatch(f"{len(sources)} source blocks for {len(targets)} target blocks, wanted equal numbers")
    count, words = len(sources), extent // 8
    sums = needs.torch.zeros(count, dtype=needs.torch.int64, device=sources.device) if checksum else None
    if count:
        cols = min(TILE // 8, 1 << (words - 1).bit_length())
        parts = -(-words // cols)
        needs.kernels.copy_extents[(count * parts,)](
            source.address, target.address, sources, targets, sources if lengths is None else lengths,
            sources if sums is None else sums,
            unit // 8, words, first or 0, parts,
            COLS=cols, COPY=copy, SUM=checksum, LENGTHS=lengths is not None, PLACES=first is not None,
            num_warps=_warps(cols),
        )  # fmt: skip
    return sums


def _warps(words: int) -> int:
    return max(1, words * 8 // WARP)


def copy_kv(
    source: Pool, source_view: KVView, source_blocks: npt.ArrayLike,
    target: Pool, target_view: KVView, target_blocks: npt.ArrayLike,
    tokens: tuple[int, int], *, group: int = 0,
) -> Any:  # fmt: skip
    """Copy `tokens` of a sequence between pools of different layouts: all layers and heads that both hold.

    `*_blocks` are the sequence's blocks in each pool, from its token 0 on. With `group`, return int64[n]: the checksum
    of each `group` tokens (:func:`view.kv_sums`). Raises :class:`LayoutMismatch` before anything is queued.
    """
    region = views.shared(source_view, target_view, tokens)
    return copy_region(source, source_view, source_blocks, target, target_view, target_blocks, region, group=group)


def sum_kv(pool: Pool, view: KVView, blocks: npt.ArrayLike, region: Region, group: int) -> Any:
    """Return int64[n]: the checksums that :func:`copy_kv` gives for the same KV in any layout, without a copy."""
    return copy_region(pool, view, blocks, None, view, blocks, region, group=group)


def copy_region(
    source: Pool, source_view: KVView, source_blocks: npt.ArrayLike,
    target: Pool | None, target_view: KVView, target_blocks: npt.ArrayLike, region: Region, *, group: int = 0,
) -> Any:  # fmt: skip
    """As :func:`copy_kv`, of the part that `region` says: a range of layers as they are computed, heads of one rank."""
    needs = gpu()
    tables = [np.array(blocks, dtype=np.int64) for blocks in (source_blocks, target_blocks)]
    views.check(source_view, tables[0], region, source.nbytes, "source", unique=False)
    if target is not None:
        views.check(target_view, tables[1], region, target.nbytes, "target", unique=True)
    words = source_view.head_bytes // 8
    heads = region.heads[1] - region.heads[0]
    cols = min(TILE // 8, 1 << (heads * words - 1).bit_length())
    # A program's tokens are a power of two that divides both block sizes and the group.
    common = math.gcd(source_view.block_size, target_view.block_size, group)
    rows = min(TILE // 8 // cols, common & -common)
    for one in (source_view, target_view):
        if rows * one.token_stride + heads * one.head_stride >= _REACH:
            raise LayoutMismatch(
                f"a token's heads lie {heads * one.head_stride} bytes apart, wanted less than {_REACH}"
            )
    first, last = region.tokens[0] // rows, -(-region.tokens[1] // rows)
    # Tiles of a target block, whose bytes lie together in a block-major pool.
    span = max(1, target_view.block_size // rows)
    parts, pairs = -(-heads * words // cols), 2 * (region.layers[1] - region.layers[0])
    groups = -(-region.tokens[1] // group) - region.tokens[0] // group if group else 0
    torch = needs.torch
    there, here = (_upload(part) for part in tables)
    sums = torch.zeros(groups, dtype=torch.int64, device=there.device)
    needs.kernels.copy_kv[(-(-(last - first) // span) * span * pairs * parts,)](
        source.address, source.address if target is None else target.address, there, here, sums,
        first, last, *region.tokens, 2 * region.layers[0], pairs, region.heads[0], heads, group or 1, parts,
        *_strides(source_view), *_strides(target_view), S_SIZE=source_view.block_size, T_SIZE=target_view.block_size,
        SPAN=span, TOKENS=rows, COLS=cols, WORDS=words, COPY=target is not None, SUM=group > 0,
        num_warps=_warps(rows * cols),
    )  # fmt: skip
    return sums if group else None


def _strides(view: KVView) -> tuple[int, ...]:
    parts = (view.block_stride, view.layer_stride, view.kv_stride, view.token_stride, view.head_stride)
    return (*(part // 8 for part in parts), view.first_layer, view.first_head)
