"""Which bytes go where: from block tables and the shapes of two pools to the fewest copies. Pure functions on numpy.

A plan is three arrays of equal length: extent `i` copies ``nbytes[i]`` bytes from offset ``source[i]`` of prefill's
pool to offset ``target[i]`` of decode's pool. Neighbours that follow one another on *both* sides are one extent.

The two pools need not look alike. A :class:`Shard` says how one pool lies in memory: which layers and heads it holds,
how long its blocks are, and in which order its axes follow. :func:`slices` plans between any two of them, so unequal
tensor parallel sizes, block sizes, block-major and layer-major pools, layer by layer and prefix-aware transfers are
one function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pdstack.transfer.layout import KVLayout

Offsets = npt.NDArray[np.int64]

BLOCK_MAJOR = ("block", "layer", "kv", "token", "head")
LAYER_MAJOR = ("layer", "kv", "block", "token", "head")


@dataclass(frozen=True, eq=False)
class Plan:
    """Extents in the order of their targets. All three arrays are int64, one-dimensional and read-only; unit: bytes.

    Raises ValueError for arrays that do not fit together, for negative offsets, and if two extents would write one
    byte (two threads would race for it).
    """

    source: Offsets
    target: Offsets
    nbytes: Offsets

    def __post_init__(self) -> None:
        arrays = []
        for name in ("source", "target", "nbytes"):
            given = np.asarray(getattr(self, name))
            if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
                raise ValueError(f"Plan.{name} is {given.dtype} of {given.ndim} axes, wanted whole numbers of one axis")
            arrays.append(given.astype(np.int64))
        source, target, nbytes = arrays
        if not len(source) == len(target) == len(nbytes):
            raise ValueError(f"a plan of {len(source)} sources, {len(target)} targets and {len(nbytes)} sizes")
        if len(nbytes) and (nbytes.min() < 1 or source.min() < 0 or target.min() < 0):
            raise ValueError("a plan has an extent that is empty or begins before its pool")
        if np.any(target[1:] < target[:-1]):
            order = np.argsort(target, kind="stable")
            source, target, nbytes = source[order], target[order], nbytes[order]
        clash = np.flatnonzero(target[:-1] + nbytes[:-1] > target[1:])
        if len(clash):
            raise ValueError(
                f"the target byte at offset {target[clash[0] + 1]} is written by two extents: a block is named twice"
            )
        for name, array in zip(("source", "target", "nbytes"), (source, target, nbytes), strict=True):
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.nbytes)

    @property
    def total(self) -> int:
        """Bytes of all extents together."""
        return int(self.nbytes.sum())

    def within(self, source_bytes: int, target_bytes: int) -> Plan:
        """This plan, if it stays inside pools of these sizes; else ValueError. Every path asks before it moves."""
        for what, offsets, size in (("source", self.source, source_bytes), ("target", self.target, target_bytes)):
            end = int((offsets + self.nbytes).max(initial=0))
            if end > size:
                raise ValueError(
                    f"the plan reaches to byte {end} of the {what} pool, which has {size}: "
                    "the block table and the pool belong to different layouts"
                )
        return self


def merge(source: npt.ArrayLike, target: npt.ArrayLike, nbytes: npt.ArrayLike) -> Plan:
    """A plan of these extents with neighbours joined; the order in which they are given does not matter."""
    return _joined(Plan(np.asarray(source), np.asarray(target), np.asarray(nbytes)))


def _joined(plan: Plan) -> Plan:
    source, target, nbytes = plan.source, plan.target, plan.nbytes
    if len(nbytes) < 2:
        return plan
    follows = (source[:-1] + nbytes[:-1] == source[1:]) & (target[:-1] + nbytes[:-1] == target[1:])
    first = np.flatnonzero(np.concatenate(([True], ~follows)))
    return Plan(source[first], target[first], np.add.reduceat(nbytes, first))


def split(plan: Plan, most: int) -> Plan:
    """The same bytes in extents of at most `most` bytes: pieces to share among threads, or to hash one by one."""
    if most < 1:
        raise ValueError(f"pieces of at most {most} bytes, wanted at least 1")
    counts = -(-plan.nbytes // most)
    if len(plan) == int(counts.sum()):
        return plan
    begin = ranges(np.zeros(len(plan), np.int64), counts) * most
    sizes = np.minimum(most, np.repeat(plan.nbytes, counts) - begin)
    return Plan(np.repeat(plan.source, counts) + begin, np.repeat(plan.target, counts) + begin, sizes)


def blocks(block_bytes: int, source_blocks: Sequence[int] | Offsets, target_blocks: Sequence[int] | Offsets) -> Plan:
    """Whole blocks between two block-major pools of one layout. Raises ValueError as :class:`Plan` does."""
    source, target = _table(source_blocks, "source"), _table(target_blocks, "target")
    if len(source) != len(target):
        raise ValueError(f"{len(source)} source blocks for {len(target)} target blocks, wanted equal numbers")
    return merge(source * block_bytes, target * block_bytes, np.full(len(source), block_bytes, np.int64))


def _table(blocks: Sequence[int] | Offsets, what: str) -> Offsets:
    table = np.asarray(blocks)
    if table.ndim != 1 or (table.size and table.dtype.kind not in "iu"):
        raise ValueError(f"the {what} block table is {table.dtype} of {table.ndim} axes, wanted whole numbers of one")
    return table.astype(np.int64)


@dataclass(frozen=True)
class Shard:
    """What one pool holds and how: `layout` counts its own blocks, layers and heads.

    `order` names the axes from the outermost to the innermost (head_dim is always last). `first_layer` and `first_head`
    say which of the model's layers and KV heads the pool's own first ones are: pipeline and tensor parallel ranks.
    """

    layout: KVLayout
    order: tuple[str, ...] = BLOCK_MAJOR
    first_layer: int = 0
    first_head: int = 0

    def __post_init__(self) -> None:
        if sorted(self.order) != sorted(BLOCK_MAJOR):
            raise ValueError(f"Shard.order is {self.order}, wanted an order of {BLOCK_MAJOR}")
        if self.first_layer < 0 or self.first_head < 0:
            raise ValueError("Shard.first_layer and Shard.first_head count the model's layers and heads from 0")

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return self.layout.num_blocks * self.layout.block_bytes

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of one token, the smallest thing that is moved."""
        return self.layout.head_dim * np.dtype(self.layout.dtype).itemsize

    def strides(self) -> dict[str, int]:
        """Bytes from one index of an axis to the next."""
        counts = dict(zip(BLOCK_MAJOR, self.layout.shape[:-1], strict=True))
        steps, step = {}, self.head_bytes
        for axis in reversed(self.order):
            steps[axis] = step
            step *= counts[axis]
        return steps


def _overlap(first: int, count: int, other_first: int, other_count: int) -> range:
    return range(max(first, other_first), min(first + count, other_first + other_count))


class _Axis(NamedTuple):
    length: int
    source: int  # bytes from one index to the next
    target: int


def slices(
    source: Shard,
    source_blocks: Sequence[int] | Offsets,
    target: Shard,
    target_blocks: Sequence[int] | Offsets,
    tokens: int,
    *,
    skip: int = 0,
    layers: range | None = None,
) -> Plan:
    """Everything of tokens `skip` to `tokens` that both pools hold, from one shape into the other.

    The block tables are in the order of the tokens. `layers` (model numbers, step 1) narrows it further: one call a
    group of layers is layer-wise pipelining. Where prefill and decode hold different heads, only the common ones
    are planned; the other prefill ranks' plans bring the rest. Raises ValueError if the shards are of different models,
    a table is too short for `tokens`, or a block is outside its pool.
    """
    _same_model(source, target)
    if not 0 <= skip <= tokens:
        raise ValueError(f"tokens {skip} to {tokens} were asked for, wanted 0 <= skip <= tokens")
    tables = {}
    for what, shard, given in (("source", source, source_blocks), ("target", target, target_blocks)):
        table, size = _table(given, what), shard.layout.block_size
        if len(table) * size < tokens:
            raise ValueError(f"{tokens} tokens do not fit the {len(table)} {what} blocks of {size} tokens")
        if len(table) and (table.min() < 0 or table.max() >= shard.layout.num_blocks):
            raise ValueError(f"a {what} block is outside the pool, which has blocks 0 to {shard.layout.num_blocks - 1}")
        tables[what] = table
    chosen = _overlap(source.first_layer, source.layout.num_layers, target.first_layer, target.layout.num_layers)
    if layers is not None:
        if layers.step != 1:
            raise ValueError(f"layers are {layers}, wanted a range of step 1")
        chosen = range(max(chosen.start, layers.start), min(chosen.stop, layers.stop))
    heads = _overlap(source.first_head, source.layout.num_kv_heads, target.first_head, target.layout.num_kv_heads)
    if not len(chosen) or not len(heads) or skip == tokens:
        nothing = np.zeros(0, np.int64)
        return Plan(nothing, nothing, nothing)

    begins, lengths = _spans(skip, tokens, source.layout.block_size, target.layout.block_size)
    steps = (source.strides(), target.strides())
    starts = []
    for what, shard, step in (("source", source, steps[0]), ("target", target, steps[1])):
        size = shard.layout.block_size
        starts.append(
            tables[what][begins // size] * step["block"]
            + begins % size * step["token"]
            + (chosen.start - shard.first_layer) * step["layer"]
            + (heads.start - shard.first_head) * step["head"]
        )
    parts = []
    for length in np.unique(lengths):  # whole spans, and a few shorter ones at the ends
        mine = lengths == length
        counts = {"head": len(heads), "token": int(length), "kv": 2, "layer": len(chosen)}
        axes = [_Axis(count, steps[0][axis], steps[1][axis]) for axis, count in counts.items()]
        parts.append(_box(starts[0][mine], starts[1][mine], axes, source.head_bytes))
    plan = merge(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    return plan.within(source.nbytes, target.nbytes)


def _same_model(source: Shard, target: Shard) -> None:
    for field in ("head_dim", "dtype", "model_id"):
        found, wanted = getattr(source.layout, field), getattr(target.layout, field)
        if found != wanted:
            raise ValueError(
                f"the source pool has {field} {found!r}, the target pool {wanted!r}: "
                "prefill and decode must serve one model with one KV cache dtype"
            )


def _spans(skip: int, tokens: int, *block_sizes: int) -> tuple[Offsets, Offsets]:
    """Token ranges that lie in one block on every side: their first tokens and their lengths."""
    cuts = [np.arange(size * (skip // size + 1), tokens, size, dtype=np.int64) for size in block_sizes]
    edges = np.unique(np.concatenate([np.array([skip, tokens], np.int64), *cuts]))
    return edges[:-1], np.diff(edges)


def _box(source: Offsets, target: Offsets, axes: list[_Axis], chunk: int) -> tuple[Offsets, Offsets, Offsets]:
    """The extents of one strided box at each pair of starts; axes that lie dense on both sides are folded."""
    left = [axis for axis in axes if axis.length > 1]
    while dense := next((axis for axis in left if axis.source == axis.target == chunk), None):
        chunk *= dense.length
        left.remove(dense)
    for axis in left:
        index = np.arange(axis.length, dtype=np.int64)
        source = (source[:, None] + index * axis.source).reshape(-1)
        target = (target[:, None] + index * axis.target).reshape(-1)
    return source, target, np.full(len(source), chunk, np.int64)


class Costs(NamedTuple):
    """Measured, for one path: seconds an operation takes however small it is, and bytes per second beyond that.

    The local pair is the same for copies inside the consumer, from a staging area to its pool.
    """

    operation_s: float
    bytes_per_s: float
    local_operation_s: float
    local_bytes_per_s: float

    def transfer_s(self, plan: Plan) -> float:
        """What `plan` takes over the path."""
        return len(plan) * self.operation_s + plan.total / self.bytes_per_s

    def local_s(self, plan: Plan) -> float:
        """What `plan` takes inside the consumer."""
        return len(plan) * self.local_operation_s + plan.total / self.local_bytes_per_s


class Whole(NamedTuple):
    """Two plans instead of one: whole granules into a staging area, and from there the slices into the pool."""

    transfer: Plan  # targets are offsets in the staging area
    slicing: Plan  # sources are offsets in the staging area
    staging_bytes: int


def moved_whole(plan: Plan, granule_bytes: int, source_bytes: int, costs: Costs) -> Whole | None:
    """The two plans that move whole granules and slice at the consumer, if that is faster by `costs`; else None.

    A granule is what lies dense in the source pool and is worth moving at once: a block, or one layer's keys of a
    block. `source_bytes` is the size of the source pool; its last granule may be short. More bytes move than are
    needed, over fewer operations.
    """
    if granule_bytes < 1:
        raise ValueError(f"a granule of {granule_bytes} bytes, wanted at least 1")
    if not len(plan):
        return None
    first = plan.source // granule_bytes
    last = (plan.source + plan.nbytes - 1) // granule_bytes
    touched = np.unique(ranges(first, last - first + 1))
    # An extent over several granules stays one: all of them are touched, so they lie side by side in staging too.
    staged = np.searchsorted(touched, first) * granule_bytes + plan.source % granule_bytes
    begins = touched * granule_bytes
    sizes = np.minimum(granule_bytes, source_bytes - begins)
    transfer = merge(begins, np.arange(len(touched), dtype=np.int64) * granule_bytes, sizes)
    slicing = merge(staged, plan.target, plan.nbytes)
    if costs.transfer_s(transfer) + costs.local_s(slicing) >= costs.transfer_s(plan):
        return None
    return Whole(transfer, slicing, len(touched) * granule_bytes)


def ranges(first: Offsets, counts: Offsets) -> Offsets:
    """first[i], first[i] + 1, ... counts[i] of them, one after the other."""
    within = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first, counts) + within
