"""What can be said of the path `cuda_ipc` without a GPU: its plans, its metadata, and why a peer is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdstack.transfer import KVLayout, LayoutMismatch, ReadFailed
from pdstack.transfer.errors import PathUnavailable
from pdstack.transfer.gpu import ipc
from pdstack.transfer.paths.base import paths_of
from pdstack.transfer.paths.blocks import whole_blocks
from pdstack.transfer.paths.gpu import GpuPeer
from pdstack.transfer.plan import blocks, merge
from pdstack.transfer.store import store_of

HERE = ipc.Place(boot=ipc.boot(), pid_namespace="pid:[1]", pid=10, gpu="a" * 32, mig=False)


@given(st.lists(st.integers(0, 60), max_size=40, unique=True), st.randoms(use_true_random=False))
def test_a_plan_of_blocks_is_those_blocks_in_the_order_of_their_targets(targets: list[int], random: Any) -> None:
    sources = [random.randrange(100) for _ in targets]
    there, here = whole_blocks(blocks(4096, sources, targets), 4096)
    wanted = sorted(zip(targets, sources, strict=True))
    assert list(zip(here.tolist(), there.tolist(), strict=True)) == wanted


@pytest.mark.parametrize(("source", "target", "nbytes"), [(16, 0, 4096), (0, 16, 4096), (0, 0, 4112)])
def test_a_cut_block_is_refused(source: int, target: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match="whole blocks"):
        whole_blocks(merge([source], [target], [nbytes]), 4096)


def export(**changes: Any) -> bytes:
    place = ipc.Place(**{**vars(HERE), **changes})
    return ipc.Export("00" * 64, 0, 1 << 20, place).to_json().encode()


def test_a_pool_on_another_host_is_not_permitted_even_where_no_driver_is() -> None:
    no_store: Any = SimpleNamespace(ordinal=0)  # it is refused before our own pool is looked at
    with pytest.raises(ReadFailed, match=r"on another host.*path staged") as refused:
        GpuPeer(export(boot="another"), no_store)
    assert refused.value.code == "not_permitted"


@pytest.mark.parametrize("metadata", [b"", b"\xff", b"{}", json.dumps({"version": 9}).encode()])
def test_other_metadata_is_refused(metadata: bytes) -> None:
    no_store: Any = None
    with pytest.raises(ReadFailed, match="cannot be read") as refused:
        GpuPeer(metadata, no_store)
    assert refused.value.code == "read_failed"


@pytest.mark.parametrize("pool", [b"bytes", [1, 2]])
def test_a_pool_is_an_array_or_a_tensor(pool: Any) -> None:
    with pytest.raises(LayoutMismatch, match="wanted a numpy array or a torch tensor"):
        store_of(KVLayout(1, 1, 1, 1, 8), pool)


def test_a_path_is_of_one_kind_of_pool() -> None:
    assert paths_of("auto", "cuda") == ("cuda_ipc", "staged")
    assert paths_of("staged", "cuda") == ("staged",)
    assert "cuda_ipc" not in paths_of("auto")
    with pytest.raises(PathUnavailable, match="'shared' and the KV pool lies in GPU memory, wanted auto or one of"):
        paths_of("shared", "cuda")
    with pytest.raises(PathUnavailable, match="'cuda_ipc' and the KV pool lies in host memory"):
        paths_of("cuda_ipc")
