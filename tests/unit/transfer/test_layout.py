"""Layouts, plans, checksums."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdstack.transfer import KVLayout, LayoutMismatch, allocate_pool
from pdstack.transfer.layout import check_blocks, check_pool, plan_runs

LAYOUT = KVLayout(num_blocks=8, num_layers=2, block_size=4, num_kv_heads=2, head_dim=4, model_id="m")


@st.composite
def block_pairs(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Remote and local blocks with runs in them, as a pool in use gives them."""
    remote: list[int] = []
    local: list[int] = []
    free = 0
    for _ in range(draw(st.integers(0, 8))):
        length, start = draw(st.integers(1, 6)), draw(st.integers(0, 30))
        free += draw(st.integers(0, 2))
        remote += range(start, start + length)
        local += range(free, free + length)
        free += length
    return remote, local


@given(block_pairs())
def test_a_plan_copies_exactly_the_pairs_asked_for(pairs: tuple[list[int], list[int]]) -> None:
    remote, local = pairs
    copied = [(run.remote + i, run.local + i) for run in plan_runs(remote, local) for i in range(run.blocks)]
    assert copied == list(zip(remote, local, strict=True))


@given(block_pairs())
def test_a_plan_leaves_nothing_to_merge(pairs: tuple[list[int], list[int]]) -> None:
    runs = plan_runs(*pairs)
    for left, right in pairwise(runs):
        assert (left.remote + left.blocks, left.local + left.blocks) != (right.remote, right.local)


@pytest.mark.parametrize(("remote", "local"), [([1], [1, 2]), ([1, 2], [3, 3])])
def test_impossible_plans_are_refused(remote: list[int], local: list[int]) -> None:
    with pytest.raises(ValueError, match=r"blocks|twice"):
        plan_runs(remote, local)


@pytest.mark.parametrize("block", [-1, 8])
def test_blocks_outside_the_pool_are_refused(block: int) -> None:
    with pytest.raises(ValueError, match="outside the pool"):
        check_blocks([0, block], 8, "local")


def test_fingerprint_is_about_meaning_not_size() -> None:
    assert replace(LAYOUT, num_blocks=99).fingerprint() == LAYOUT.fingerprint()
    changes: list[dict[str, Any]] = [
        {"num_layers": 3}, {"block_size": 8}, {"num_kv_heads": 1}, {"head_dim": 8}, {"dtype": "float16"},
        {"model_id": "n"},
    ]  # fmt: skip
    prints = {replace(LAYOUT, **change).fingerprint() for change in changes}
    assert len(prints | {LAYOUT.fingerprint()}) == len(changes) + 1


def test_pool_is_what_the_layout_says() -> None:
    pool = allocate_pool(LAYOUT)
    view = check_pool(LAYOUT, pool)
    assert pool.shape == LAYOUT.shape
    assert (view.address % (2 << 20), view.nbytes) == (0, pool.nbytes)
    assert not pool.any()


@pytest.mark.parametrize(
    "pool",
    [
        np.zeros(LAYOUT.shape, np.float16),
        np.zeros((9, *LAYOUT.shape[1:]), np.float32),
        np.zeros((16, *LAYOUT.shape[1:]), np.float32)[::2],
    ],
    ids=["dtype", "shape", "strides"],
)
def test_other_pools_are_refused(pool: Any) -> None:
    with pytest.raises(LayoutMismatch):
        check_pool(LAYOUT, pool)


@pytest.mark.parametrize("change", [{"num_blocks": 0}, {"block_size": -1}, {"head_dim": 1.5}, {"dtype": "float33"}])
def test_impossible_layouts_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        replace(LAYOUT, **change)
