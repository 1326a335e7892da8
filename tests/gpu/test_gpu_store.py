"""A CUDA pool as the agent sees it: what is accepted, and its blocks' hashes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pdstack.transfer import KVLayout, LayoutMismatch
from pdstack.transfer.gpu import checksum
from pdstack.transfer.gpu.needs import gpu
from pdstack.transfer.gpu.store import CudaStore
from pdstack.transfer.store import store_of

LAYOUT = KVLayout(9, 3, 4, 2, 16, "float16")


def pool_of(layout: KVLayout, seed: int = 5) -> Any:
    raw = np.random.default_rng(seed).integers(0, 256, layout.block_bytes * layout.num_blocks, dtype=np.uint8)
    torch = gpu().torch
    return torch.from_numpy(raw).to(gpu().device).view(getattr(torch, layout.dtype)).view(layout.shape), raw


def test_hashes_are_those_of_each_block_alone_whatever_its_place() -> None:
    pool, raw = pool_of(LAYOUT)
    store = CudaStore(LAYOUT, pool)
    assert (store.kind, store.hashing) == ("cuda", "gpu-64")
    assert store.view == (pool.data_ptr(), LAYOUT.block_bytes, 9)
    rows = raw.reshape(9, -1)
    found = store.hashes([7, 0, 3, 3])
    assert found.dtype == np.uint64
    assert np.array_equal(found, checksum.block_sums(rows, [7, 0, 3, 3], None))
    assert np.array_equal(store.hashes([3]), found[2:3])
    assert len(store.hashes([])) == 0
    pool.view(gpu().torch.uint8).view(9, -1)[3, 5] ^= 1
    assert list(np.flatnonzero(store.hashes([7, 0, 3, 3]) != found)) == [2, 3]
    with pytest.raises(LayoutMismatch, match="block 9 is outside"):
        store.hashes([9])


def test_another_shape_dtype_place_or_order_is_refused() -> None:
    torch = gpu().torch
    pool, _ = pool_of(LAYOUT)
    assert store_of(LAYOUT, pool).kind == "cuda"
    for wrong in (pool[:8], pool.float(), pool.view(torch.int16)):
        with pytest.raises(LayoutMismatch, match=r"its layout says float16 \(9, 3, 2, 4, 2, 16\)"):
            CudaStore(LAYOUT, wrong)
    with pytest.raises(LayoutMismatch, match="contiguous"):
        CudaStore(LAYOUT, pool.transpose(0, 1).contiguous().transpose(0, 1))
    if gpu().device == "cuda":
        with pytest.raises(LayoutMismatch, match="lies on cpu, wanted cuda"):
            CudaStore(LAYOUT, pool.cpu())
    odd = KVLayout(9, 1, 1, 1, 2, "float16")
    with pytest.raises(LayoutMismatch, match="8 bytes, wanted a multiple of 16"):
        CudaStore(odd, torch.zeros(odd.shape, dtype=torch.float16, device=gpu().device))


def test_an_unsigned_layout_stands_for_a_dtype_that_numpy_does_not_have() -> None:
    torch = gpu().torch
    layout = KVLayout(9, 3, 4, 2, 16, "uint16")
    pool = torch.zeros(layout.shape, dtype=torch.bfloat16, device=gpu().device)
    assert len(CudaStore(layout, pool).hashes(range(9))) == 9
