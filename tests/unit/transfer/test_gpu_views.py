"""Index arithmetic between layouts, beside plain indexing of arrays of that shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdstack.transfer import KVLayout, LayoutMismatch, plan
from pdstack.transfer.gpu import checksum, view

STILL = settings(derandomize=True, deadline=None, max_examples=60)
# A head of 8 float16 is two 8-byte words.
DIM, WORDS = 8, 2


@st.composite
def layouts(draw: st.DrawFn) -> KVLayout:
    return KVLayout(
        draw(st.integers(1, 6)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 6)),
        draw(st.integers(1, 4)),
        DIM,
        "float16",
    )


KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "block-major": (view.block_major, ("block", "layer", "kv", "token", "head")),
    "layer-major": (view.layer_major, ("layer", "kv", "block", "token", "head")),
    "heads first": (lambda one: view.layer_major(one, heads_first=True), ("layer", "kv", "block", "head", "token")),
}


def sizes(layout: KVLayout) -> dict[str, int]:
    return {
        "block": layout.num_blocks, "layer": layout.num_layers, "kv": 2,
        "token": layout.block_size, "head": layout.num_kv_heads,
    }  # fmt: skip


def logical(pool: Any, layout: KVLayout, axes: tuple[str, ...], blocks: Any) -> Any:
    """The sequence's KV as layer, kv, token, head, word, by numpy's own indexing."""
    shaped = pool.view(np.uint64).reshape(*(sizes(layout)[axis] for axis in axes), WORDS)
    order = [axes.index(axis) for axis in ("layer", "kv", "block", "token", "head")]
    return shaped.transpose(*order, 5)[:, :, blocks].reshape(layout.num_layers, 2, -1, layout.num_kv_heads, WORDS)


@STILL
@given(layouts(), st.sampled_from(sorted(KINDS)), st.data())
def test_heads_are_where_plain_indexing_finds_them(layout: KVLayout, kind: str, data: st.DataObject) -> None:
    make, axes = KINDS[kind]
    seen = make(layout).shard(data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5)))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    pool = rng.integers(0, 256, seen.nbytes, dtype=np.uint8)
    blocks = rng.permutation(layout.num_blocks)
    last = layout.num_blocks * layout.block_size
    low = data.draw(st.integers(0, last - 1))
    region = view.Region(
        (seen.first_layer, seen.first_layer + layout.num_layers),
        (low, data.draw(st.integers(low + 1, last))),
        (seen.first_head, seen.first_head + layout.num_kv_heads),
    )
    view.check(seen, blocks, region, len(pool), "source", unique=True)
    expected = logical(pool, layout, axes, blocks)[:, :, slice(*region.tokens)]
    assert np.array_equal(view.read_heads(pool, seen, blocks, region), expected)


@STILL
@given(layouts(), layouts(), st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(KINDS)), st.data())
def test_kv_moves_between_any_two_layouts_and_nothing_else_is_touched(
    one: KVLayout, other: KVLayout, kind: str, another: str, data: st.DataObject
) -> None:
    source, target = KINDS[kind][0](one), KINDS[another][0](other)
    # Some layer and some head is in both.
    source = source.shard(
        data.draw(st.integers(0, other.num_layers - 1)), data.draw(st.integers(0, other.num_kv_heads - 1))
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    there, here = (rng.integers(0, 256, part.nbytes, dtype=np.uint8) for part in (source, target))
    s, t = rng.permutation(one.num_blocks), rng.permutation(other.num_blocks)
    tokens = (0, min(one.num_blocks * one.block_size, other.num_blocks * other.block_size))
    region = view.shared(source, target, tokens)
    assert region.layers == (source.first_layer, min(source.first_layer + one.num_layers, other.num_layers))
    heads = view.read_heads(there, source, s, region)
    before = here.copy()
    view.write_heads(here, target, t, region, heads)
    assert np.array_equal(view.read_heads(here, target, t, region), heads)
    touched = np.zeros(len(here) // 16, dtype=int)
    np.add.at(touched, view.offsets(target, t, region).reshape(-1) // 16, 1)
    assert touched.max() == 1
    assert np.array_equal(here.reshape(-1, 16)[touched == 0], before.reshape(-1, 16)[touched == 0])
    group = data.draw(st.integers(1, 9))
    sums = view.kv_sums(view.read_heads(here, target, t, region), region, group)
    assert np.array_equal(sums, view.kv_sums(heads, region, group))
    assert len(sums) == -(-tokens[1] // group)


@STILL
@given(layouts(), layouts(), st.permutations(plan.BLOCK_MAJOR), st.permutations(plan.BLOCK_MAJOR), st.data())
def test_the_kernel_moves_what_a_transfer_plan_moves(
    one: KVLayout, other: KVLayout, order: list[str], another: list[str], data: st.DataObject
) -> None:
    first = (data.draw(st.integers(0, other.num_layers - 1)), data.draw(st.integers(0, other.num_kv_heads - 1)))
    shards = plan.Shard(one, tuple(order), *first), plan.Shard(other, tuple(another))
    views = [view.of(shard) for shard in shards]
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    there, here = (rng.integers(0, 256, shard.nbytes, dtype=np.uint8) for shard in shards)
    assert [part.nbytes for part in views] == [len(there), len(here)]
    s, t = rng.permutation(one.num_blocks), rng.permutation(other.num_blocks)
    tokens = min(one.num_blocks * one.block_size, other.num_blocks * other.block_size)
    skip = data.draw(st.integers(0, tokens - 1))
    region = view.shared(*views, (skip, tokens))
    planned = here.copy()
    for source, target, nbytes in zip(
        *extents(plan.slices(shards[0], s, shards[1], t, tokens, skip=skip)), strict=True
    ):
        planned[target : target + nbytes] = there[source : source + nbytes]
    view.write_heads(here, views[1], t, region, view.read_heads(there, views[0], s, region))
    assert np.array_equal(here, planned)


def extents(found: plan.Plan) -> tuple[list[int], list[int], list[int]]:
    # Cut as the kernel's pieces are.
    source, target, nbytes = view.cut(found.source, found.target, found.nbytes, 48)
    return source.tolist(), target.tolist(), nbytes.tolist()


def test_checksums_of_slices_add_up_to_those_of_the_whole() -> None:
    layout = KVLayout(4, 3, 4, 4, DIM, "float16")
    seen = view.block_major(layout)
    pool = np.random.default_rng(1).integers(0, 256, seen.nbytes, dtype=np.uint8)
    whole = view.Region((0, 3), (0, 16), (0, 4))
    sums = view.kv_sums(view.read_heads(pool, seen, range(4), whole), whole, 4)
    total = np.zeros(4, np.uint64)
    for layers in ((0, 1), (1, 3)):
        for heads in ((0, 2), (2, 3), (3, 4)):
            part = view.Region(layers, (0, 16), heads)
            total += view.kv_sums(view.read_heads(pool, seen, range(4), part), part, 4)
    assert np.array_equal(total, sums)
    later = view.Region((0, 3), (6, 16), (0, 4))
    assert np.array_equal(view.kv_sums(view.read_heads(pool, seen, range(4), later), later, 4)[1:], sums[2:])
    moved = pool.copy()
    view.write_heads(moved, seen, [1, 0, 2, 3], whole, view.read_heads(pool, seen, range(4), whole))
    assert checksum.combine(view.kv_sums(view.read_heads(moved, seen, range(4), whole), whole, 4)) != checksum.combine(
        sums
    )


@STILL
@given(st.lists(st.integers(0, 400), max_size=12), st.integers(1, 9))
def test_cut_extents_cover_the_same_bytes(lengths: list[int], piece: int) -> None:
    nbytes = np.array(lengths, dtype=np.int64) * 16
    source = np.cumsum(nbytes) - nbytes
    target = source[::-1] + 1000
    s, t, n = view.cut(source, target, nbytes, piece * 16)
    assert not len(n) or (n.max() <= piece * 16 and n.min() > 0)

    def pairs(a: Any, b: Any, c: Any) -> list[tuple[int, int]]:
        return sorted((int(x) + i, int(y) + i) for x, y, z in zip(a, b, c, strict=True) for i in range(0, int(z), 16))

    assert pairs(s, t, n) == pairs(source, target, nbytes)


def test_what_cannot_be_copied_is_refused_with_the_reason() -> None:
    seen = view.block_major(KVLayout(4, 3, 4, 4, DIM, "float16"))
    region = view.Region((0, 3), (0, 16), (0, 4))
    blocks = np.arange(4)

    def refused(match: str, **changed: Any) -> None:
        given = {
            "view": seen,
            "blocks": blocks,
            "region": region,
            "pool_bytes": seen.nbytes,
            "what": "target",
            "unique": True,
        }
        with pytest.raises(LayoutMismatch, match=match):
            view.check(**(given | changed))

    refused("layers 0 to 3", region=replace(region, layers=(0, 4)))
    refused("heads 2 to 4", region=replace(region, heads=(2, 5)))
    refused(
        "tokens 0 to 16 are wanted, the target holds tokens 0 to 15: name more blocks",
        region=replace(region, tokens=(0, 17)),
    )
    refused("tokens 3 to 2", region=replace(region, tokens=(3, 3)))
    refused("its pool has", pool_bytes=seen.nbytes - 1)
    refused("block 4 is outside", blocks=np.array([0, 1, 2, 4]))
    refused("block -1 is outside", blocks=np.array([0, 1, 2, -1]))
    refused("named twice", blocks=np.array([0, 1, 2, 2]))
    with pytest.raises(LayoutMismatch, match="share no head"):
        view.shared(seen, seen.shard(0, 4), (0, 16))
    with pytest.raises(LayoutMismatch, match="share no layer"):
        view.shared(seen, seen.shard(3, 0), (0, 16))
    with pytest.raises(LayoutMismatch, match="does not convert"):
        view.shared(seen, view.block_major(KVLayout(4, 3, 4, 4, DIM * 2, "float16")), (0, 16))
    with pytest.raises(LayoutMismatch, match="multiple of 16"):
        view.block_major(KVLayout(4, 3, 4, 4, 3, "float16"))
