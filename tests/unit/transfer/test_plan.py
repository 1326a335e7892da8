"""Plans against an oracle that names every byte on its own: each needed byte exactly once, no other byte touched."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdstack.transfer.layout import KVLayout
from pdstack.transfer.plan import (
    BLOCK_MAJOR,
    LAYER_MAJOR,
    Costs,
    Plan,
    Shard,
    Whole,
    blocks,
    merge,
    moved_whole,
    slices,
    split,
)

exact = settings(derandomize=True, deadline=None, max_examples=100)
DIM = 2
ORDERS = (
    BLOCK_MAJOR,
    LAYER_MAJOR,
    ("block", "layer", "kv", "head", "token"),
    ("layer", "block", "kv", "token", "head"),
)
HUGE_OPERATION = Costs(1.0, 1e9, 0.0, 1e9)


def shard(**values: Any) -> Shard:
    place = {name: values.pop(name) for name in ("order", "first_layer", "first_head") if name in values}
    layout = {"num_blocks": 6, "num_layers": 2, "block_size": 4, "num_kv_heads": 2, "head_dim": DIM, "dtype": "int16"}
    return Shard(KVLayout(**{**layout, **values}), **place)


def carry_out(plan: Plan, source: np.ndarray, target_bytes: int) -> np.ndarray:
    """A target of 0xFF bytes after the plan; a byte written twice or out of bounds is an error."""
    target = np.full(target_bytes, 0xFF, np.uint8)
    written = np.zeros(target_bytes, bool)
    for begin, to, size in zip(plan.source, plan.target, plan.nbytes, strict=True):
        assert begin + size <= len(source)
        assert to + size <= target_bytes
        assert not written[to : to + size].any()
        written[to : to + size] = True
        target[to : to + size] = source[begin : begin + size]
    return target


def element(held: Shard, table: list[int], layer: int, kv: int, position: int, head: int, dim: int) -> int:
    """Index of one int16 in a pool, from its axes by name: independent of the strides under test."""
    layout = held.layout
    at = {
        "block": (table[position // layout.block_size], layout.num_blocks),
        "layer": (layer - held.first_layer, layout.num_layers),
        "kv": (kv, 2),
        "token": (position % layout.block_size, layout.block_size),
        "head": (head - held.first_head, layout.num_kv_heads),
    }
    index = [at[axis][0] for axis in held.order] + [dim]
    shape = [at[axis][1] for axis in held.order] + [DIM]
    return int(np.ravel_multi_index(index, shape))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    tokens = draw(st.integers(0, 24))
    sides = []
    for _ in range(2):
        size = draw(st.sampled_from((1, 2, 3, 4, 8)))
        needed = -(-tokens // size)
        count = needed + draw(st.integers(1, 4))
        held = shard(
            num_blocks=count,
            block_size=size,
            num_layers=draw(st.integers(1, 4)),
            num_kv_heads=draw(st.integers(1, 4)),
            order=draw(st.sampled_from(ORDERS)),
            first_layer=draw(st.integers(0, 2)),
            first_head=draw(st.integers(0, 3)),
        )
        sides.append((held, draw(st.permutations(range(count)))[:needed]))
    layers = draw(st.none() | st.builds(range, st.integers(0, 4), st.integers(0, 6)))
    return {"sides": sides, "tokens": tokens, "skip": draw(st.integers(0, tokens)), "layers": layers}


def needed(held: Shard) -> tuple[range, range]:
    return (
        range(held.first_layer, held.first_layer + held.layout.num_layers),
        range(held.first_head, held.first_head + held.layout.num_kv_heads),
    )


@exact
@given(cases())
def test_slices_move_every_needed_element_once_and_nothing_else(case: dict[str, Any]) -> None:
    (source, source_table), (target, target_table) = case["sides"]
    plan = slices(source, source_table, target, target_table, case["tokens"], skip=case["skip"], layers=case["layers"])
    content = np.arange(source.nbytes // 2, dtype=np.int16)
    got = carry_out(plan, content.view(np.uint8), target.nbytes).view(np.int16)
    wanted = np.full(target.nbytes // 2, -1, np.int16)
    (layers, heads), (other_layers, other_heads) = needed(source), needed(target)
    common = [x for x in layers if x in other_layers and (case["layers"] is None or x in case["layers"])]
    both = [x for x in heads if x in other_heads]
    for layer, kv, position, head, dim in product(
        common, (0, 1), range(case["skip"], case["tokens"]), both, range(DIM)
    ):
        place = (layer, kv, position, head, dim)
        wanted[element(target, target_table, *place)] = content[element(source, source_table, *place)]
    assert np.array_equal(got, wanted)
    # As few extents as there can be: no two neighbours are left apart.
    assert not np.any(
        (plan.source[:-1] + plan.nbytes[:-1] == plan.source[1:])
        & (plan.target[:-1] + plan.nbytes[:-1] == plan.target[1:])
    )


@exact
@given(cases(), st.sampled_from((4, 16, 48, 1000)))
def test_moving_whole_granules_gives_the_same_bytes(case: dict[str, Any], granule: int) -> None:
    (source, source_table), (target, target_table) = case["sides"]
    plan = slices(source, source_table, target, target_table, case["tokens"], skip=case["skip"])
    content = np.random.default_rng(1).integers(0, 255, source.nbytes, np.uint8)
    # An operation that costs nothing locally and everything remotely: chosen whenever it saves one.
    whole = moved_whole(plan, granule, source.nbytes, HUGE_OPERATION)
    if whole is None:
        begins = plan.source // granule
        ends = (plan.source + plan.nbytes - 1) // granule
        touched = sorted({g for a, b in zip(begins, ends, strict=True) for g in range(a, b + 1)})
        runs = sum(1 for i, g in enumerate(touched) if i == 0 or touched[i - 1] + 1 != g)
        assert runs >= len(plan)
        return
    staged = carry_out(whole.transfer.within(source.nbytes, whole.staging_bytes), content, whole.staging_bytes)
    got = carry_out(whole.slicing.within(whole.staging_bytes, target.nbytes), staged, target.nbytes)
    assert np.array_equal(got, carry_out(plan, content, target.nbytes))


@exact
@given(st.data())
def test_merge_does_not_depend_on_the_order(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 20))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    gaps = data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    target = np.cumsum([0, *sizes[:-1]]) + np.cumsum(gaps)
    source = np.array(data.draw(st.lists(st.integers(0, 40), min_size=count, max_size=count)))
    if data.draw(st.booleans()):
        source = target + 7
    order = data.draw(st.permutations(range(count)))
    content = np.arange(256, dtype=np.uint8)
    straight = merge(source, target, sizes)
    mixed = merge(source[order], target[order], np.array(sizes)[order])
    for name in ("source", "target", "nbytes"):
        assert np.array_equal(getattr(straight, name), getattr(mixed, name))
    plain = Plan(source, target, np.array(sizes))
    assert np.array_equal(carry_out(straight, content, 256), carry_out(plain, content, 256))
    assert len(straight) <= len(plain)


@exact
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), max_size=8), st.integers(1, 9))
def test_split_cuts_and_merge_puts_together_again(gaps_and_sizes: list[tuple[int, int]], most: int) -> None:
    sizes = np.array([size for _, size in gaps_and_sizes], np.int64)
    begins = np.cumsum(sizes + [gap for gap, _ in gaps_and_sizes]) - sizes
    plan = merge(begins + 5, begins, sizes)
    pieces = split(plan, most)
    assert pieces.total == plan.total
    assert len(pieces) == sum(-(-size // most) for size in plan.nbytes.tolist())
    assert all(0 < size <= most for size in pieces.nbytes.tolist())
    again = merge(pieces.source, pieces.target, pieces.nbytes)
    assert np.array_equal(again.source, plan.source)
    assert np.array_equal(again.nbytes, plan.nbytes)


def test_runs_are_merged_on_both_sides_only() -> None:
    assert blocks(10, [4, 5, 6, 9], [0, 1, 2, 3]).nbytes.tolist() == [30, 10]
    assert blocks(10, [4, 5, 6], [2, 1, 0]).nbytes.tolist() == [10, 10, 10]
    assert len(blocks(10, [], [])) == 0


def test_equal_layouts_give_the_same_plan_as_blocks() -> None:
    pool = shard(num_blocks=64)
    rng = np.random.default_rng(3)
    source, target = rng.permutation(64)[:40], rng.permutation(64)[:40]
    whole, sliced = blocks(pool.layout.block_bytes, source, target), slices(pool, source, pool, target, 160)
    assert np.array_equal(whole.source, sliced.source)
    assert np.array_equal(whole.nbytes, sliced.nbytes)


def test_one_decode_rank_is_filled_by_several_prefill_ranks_and_layer_by_layer() -> None:
    decode = shard(num_kv_heads=4)
    ranks = [shard(num_kv_heads=2, first_head=head) for head in (0, 2)]
    parts = [
        slices(rank, [5, 0], decode, [1, 3], 8, layers=range(layer, layer + 1)) for rank in ranks for layer in (0, 1)
    ]
    together = merge(*(np.concatenate([getattr(p, n) for p in parts]) for n in ("source", "target", "nbytes")))
    assert together.total == 2 * decode.layout.block_bytes


def test_a_tensor_parallel_slice_of_llama_is_4_kib() -> None:
    shape = {"num_layers": 32, "block_size": 16, "head_dim": 128, "dtype": "float16"}
    head_major = ("block", "layer", "kv", "head", "token")
    prefill = Shard(KVLayout(num_blocks=512, num_kv_heads=8, **shape), head_major)
    decode = Shard(KVLayout(num_blocks=512, num_kv_heads=1, **shape), head_major, first_head=3)
    rng = np.random.default_rng(5)
    plan = slices(prefill, rng.permutation(512), decode, rng.permutation(512), 8192)
    assert len(plan) == 32768
    assert set(plan.nbytes.tolist()) == {4096}
    slow = Costs(operation_s=5e-6, bytes_per_s=10e9, local_operation_s=0.1e-6, local_bytes_per_s=10e9)
    assert isinstance(moved_whole(plan, 32768, prefill.nbytes, slow), Whole)
    assert moved_whole(plan, 32768, prefill.nbytes, slow._replace(operation_s=1e-7)) is None


@pytest.mark.parametrize(
    ("extents", "words"),
    [
        (([0, 8], [0, 4], [8, 8]), "written by two"),
        (([0], [0], [0]), "empty"),
        (([-1], [0], [1]), "before its pool"),
        (([0, 1], [0], [1]), "2 sources"),
        (([0.5], [0], [1]), "whole numbers"),
    ],
)
def test_plans_that_cannot_be_are_refused(extents: tuple[list[int], list[int], list[int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Plan(*(np.array(column) for column in extents))


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    pool = shard()
    with pytest.raises(ValueError, match="target pool, which has 16"):
        Plan(np.array([0]), np.array([10]), np.array([8])).within(100, 16)
    with pytest.raises(ValueError, match="do not fit the 1 source blocks"):
        slices(pool, [0], pool, [0, 1], 5)
    with pytest.raises(ValueError, match="outside the pool"):
        slices(pool, [6], pool, [0], 4)
    with pytest.raises(ValueError, match="dtype 'int16'"):
        slices(pool, [0], shard(dtype="float32"), [0], 4)
    with pytest.raises(ValueError, match="skip <= tokens"):
        slices(pool, [0], pool, [0], 3, skip=4)
    with pytest.raises(ValueError, match="written by two"):
        slices(pool, [0, 1], pool, [2, 2], 8)
