"""The kernels beside their numpy references: every byte of the target, every checksum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pdstack.transfer import KVLayout, LayoutMismatch
from pdstack.transfer.gpu import checksum, copy, view
from pdstack.transfer.gpu.needs import gpu

SIZES = (16, 48, 208, 4096, 8192, 20000, 65536, 1 << 20)


def device(array: Any) -> Any:
    return gpu().torch.from_numpy(array.copy()).to(gpu().device)


def host(tensor: Any) -> Any:
    return tensor.cpu().numpy()


def random_pool(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def unsigned(sums: Any) -> Any:
    return host(sums).view(np.uint64)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("checked", [False, True])
def test_blocks_arrive_and_nothing_else_is_touched(size: int, checked: bool) -> None:
    rng = np.random.default_rng(size)
    count = 23 if size < 1 << 20 else 5
    there, here = random_pool(1, count + 7, size), random_pool(2, count + 4, size)
    sources, targets = rng.permutation(count + 7)[:count], rng.permutation(count + 4)[:count]
    a, b = device(there), device(here)
    sums = copy.copy_blocks(
        copy.pool_of(a), copy.pool_of(b), copy.table(sources, count + 7, "source"),
        copy.table(targets, count + 4, "target", unique=True), size, checksum=checked, first=5,
    )  # fmt: skip
    wanted = here.copy()
    wanted[targets] = there[sources]
    assert np.array_equal(host(b), wanted)
    assert np.array_equal(host(a), there)
    assert (sums is None) if not checked else np.array_equal(unsigned(sums), checksum.block_sums(there, sources, 5))


def test_both_sides_see_the_same_checksum_and_one_flipped_bit_changes_it() -> None:
    pool = random_pool(3, 9, 4096)
    blocks = copy.table(range(9), 9, "summed")
    a = device(pool)
    before = unsigned(copy.sum_blocks(copy.pool_of(a), blocks, 4096))
    assert np.array_equal(before, checksum.block_sums(pool, range(9)))
    a[4, 1234] ^= 64
    after = unsigned(copy.sum_blocks(copy.pool_of(a), blocks, 4096))
    assert list(np.flatnonzero(before != after)) == [4]


def test_tables_and_pools_that_do_not_fit_are_refused_before_anything_is_queued() -> None:
    a, b = device(random_pool(3, 9, 4096)), device(random_pool(4, 8, 4096))
    nine, eight = copy.table(range(8), 9, "source"), copy.table(range(8), 8, "target")
    with pytest.raises(LayoutMismatch, match="target pool has 32768 bytes: make the table for this pool"):
        copy.copy_blocks(copy.pool_of(a), copy.pool_of(b), nine, nine, 4096, checksum=False)
    with pytest.raises(LayoutMismatch, match="summed pool has"):
        copy.sum_blocks(copy.pool_of(b), nine, 4096)
    with pytest.raises(LayoutMismatch, match="7 source blocks for 8 target blocks"):
        copy.copy_blocks(
            copy.pool_of(a), copy.pool_of(b), copy.table(range(7), 9, "source"), eight, 4096, checksum=False
        )
    with pytest.raises(LayoutMismatch, match="multiple of 16"):
        copy.copy_blocks(copy.pool_of(a), copy.pool_of(b), nine, eight, 4088, checksum=False)
    with pytest.raises(LayoutMismatch, match="contiguous"):
        copy.pool_of(a[:, :32])
    with pytest.raises(LayoutMismatch, match="block 9 is outside"):
        copy.table([9], 9, "source")
    with pytest.raises(LayoutMismatch, match="named twice"):
        copy.table([3, 3], 9, "target", unique=True)
    assert (
        copy.copy_blocks(copy.pool_of(a), copy.pool_of(b), *[copy.table([], 8, "none")] * 2, 4096, checksum=False)
        is None
    )


def test_gather_then_scatter_is_a_copy_with_equal_checksums() -> None:
    pool, away = random_pool(4, 12, 8192), random_pool(5, 12, 8192)
    a, b, staging = device(pool), device(away), device(random_pool(6, 8, 8192))
    sources, targets = [11, 0, 5, 6, 2], [3, 1, 0, 10, 7]
    out = copy.gather(copy.pool_of(a), copy.table(sources, 12, "source"), 8192, copy.pool_of(staging), checksum=True)
    into = copy.scatter(copy.pool_of(staging), copy.pool_of(b), copy.table(targets, 12, "target"), 8192, checksum=True)
    away[targets] = pool[sources]
    assert np.array_equal(host(b), away)
    assert np.array_equal(host(out), host(into))
    with pytest.raises(LayoutMismatch, match="do not fit"):
        copy.gather(copy.pool_of(a), copy.table(range(9), 12, "source"), 8192, copy.pool_of(staging), checksum=False)


def test_extents_of_any_length_are_copied() -> None:
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, 5000, 40) * 16
    sources = np.cumsum(lengths + 16 * rng.integers(0, 9, 40)) - lengths
    order = rng.permutation(40)
    targets = np.empty(40, np.int64)
    targets[order] = np.cumsum(lengths[order]) - lengths[order] + 32
    there, here = random_pool(8, int(sources[-1] + lengths[-1])), random_pool(9, int(lengths.sum()) + 64)
    a, b = device(there), device(here)
    copy.copy_extents(copy.pool_of(a), copy.pool_of(b), sources, targets, lengths)
    for source, target, length in zip(sources, targets, lengths, strict=True):
        here[target : target + length] = there[source : source + length]
    assert np.array_equal(host(b), here)
    with pytest.raises(LayoutMismatch, match="source pool has"):
        copy.copy_extents(copy.pool_of(a), copy.pool_of(b), [len(there) - 16], [0], [32])
    with pytest.raises(LayoutMismatch, match="multiples of 16"):
        copy.copy_extents(copy.pool_of(a), copy.pool_of(b), [8], [0], [32])


def layouts(seed: int) -> tuple[view.KVView, view.KVView, tuple[int, int], int]:
    rng = np.random.default_rng(seed)
    dim = int(rng.choice([8, 24, 64]))
    views = []
    for _ in range(2):
        size = int(rng.choice([4, 6, 16]))
        layout = KVLayout(-(-40 // size) + 2, int(rng.integers(1, 4)), size, int(rng.integers(1, 5)), dim, "float16")
        made = (view.block_major, view.layer_major, lambda one: view.layer_major(one, heads_first=True))[
            int(rng.integers(3))
        ](layout)
        views.append(made.shard(int(rng.integers(0, layout.num_layers)), int(rng.integers(0, layout.num_kv_heads))))
    # Layer and head 2 of the model are in both.
    views = [one.shard(max(0, 3 - one.num_layers), max(0, 3 - one.num_heads)) for one in views]
    low, high = sorted(int(part) for part in rng.choice(41, 2, replace=False))
    return views[0], views[1], (low, high), int(rng.choice([1, 6, 16, 64]))


@pytest.mark.parametrize("seed", range(24))
def test_kv_moves_between_layouts_and_its_checksums_do_not_depend_on_them(seed: int) -> None:
    source, target, tokens, group = layouts(seed)
    rng = np.random.default_rng(seed)
    there, here = random_pool(seed, source.nbytes), random_pool(seed + 1, target.nbytes)
    s, t = rng.permutation(source.num_blocks), rng.permutation(target.num_blocks)
    a, b = device(there), device(here)
    sums = copy.copy_kv(copy.pool_of(a), source, s, copy.pool_of(b), target, t, tokens, group=group)
    region = view.shared(source, target, tokens)
    heads = view.read_heads(there, source, s, region)
    view.write_heads(here, target, t, region, heads)
    assert np.array_equal(host(b), here)
    assert np.array_equal(unsigned(sums), view.kv_sums(heads, region, group))
    assert np.array_equal(host(sums), host(copy.sum_kv(copy.pool_of(b), target, t, region, group)))
    plain = device(random_pool(seed + 1, target.nbytes))
    assert copy.copy_kv(copy.pool_of(a), source, s, copy.pool_of(plain), target, t, tokens) is None
    assert np.array_equal(host(plain), here)
