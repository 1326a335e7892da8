"""The path `cuda_ipc` between two processes: every byte, every hash, and what a lost prefill or an abort leaves."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from store_pair import LAYOUT, SEED, Prefill, bits, expected, own_store, tables
from store_process import content

from pdstack.transfer import LayoutMismatch, ReadFailed
from pdstack.transfer.gpu.needs import gpu
from pdstack.transfer.paths.gpu import GpuPeer
from pdstack.transfer.plan import blocks


@pytest.fixture
def prefill() -> Iterator[Prefill]:
    made = Prefill(LAYOUT, SEED)
    yield made
    made.end()


@pytest.mark.parametrize("checked", [True, False])
def test_every_byte_arrives_nothing_else_is_touched_and_the_hashes_are_prefills(
    prefill: Prefill, checked: bool
) -> None:
    pool, store = own_store()
    source, target = tables(3)
    peer = GpuPeer(prefill.metadata["cuda_ipc"], store)
    hashes = peer.read(blocks(LAYOUT.block_bytes, source, target), checksum=checked)
    assert np.array_equal(bits(pool), expected(source, target))
    if checked:
        order = np.argsort(target)
        assert np.array_equal(hashes, prefill.call("hashes", source[order].tolist()))
        assert np.array_equal(hashes, store.hashes(target[order]))
    else:
        assert hashes is None
    peer.close()
    peer.close()
    with pytest.raises(ReadFailed, match="closed"):
        peer.read(blocks(LAYOUT.block_bytes, [0], [0]))


def test_a_byte_that_changed_after_hashing_shows(prefill: Prefill) -> None:
    _, store = own_store()
    source = list(range(100, 200))
    before = prefill.call("hashes", source)
    prefill.call("poke", 142, 999, 1)
    prefill.call("poke", 143, 999, 1)
    peer = GpuPeer(prefill.metadata["cuda_ipc"], store)
    found = peer.read(blocks(LAYOUT.block_bytes, source, list(range(100))))
    changed = set(np.flatnonzero(found != before).tolist())
    # A byte that was 1 by chance is no change; two of them were not.
    assert changed
    assert changed <= {42, 43}
    peer.close()


def test_two_mappings_of_one_pool_are_closed_one_by_one(prefill: Prefill) -> None:
    pool, store = own_store()
    first, second = GpuPeer(prefill.metadata["cuda_ipc"], store), GpuPeer(prefill.metadata["cuda_ipc"], store)
    first.close()
    source, target = tables(4)
    second.read(blocks(LAYOUT.block_bytes, source, target))
    assert np.array_equal(bits(pool), expected(source, target))
    second.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_read_goes_on_when_prefill_is_killed_or_frozen_and_then_leaves_our_blocks_alone(
    prefill: Prefill, number: signal.Signals
) -> None:
    pool, store = own_store()
    source, target = tables(5)
    plan = blocks(LAYOUT.block_bytes, source, target)
    wanted = prefill.call("hashes", source[np.argsort(target)].tolist())
    peer = GpuPeer(prefill.metadata["cuda_ipc"], store)
    ends: list[Any] = []
    stop = threading.Event()

    def reads() -> None:
        while not stop.is_set():
            ends.append(peer.read(plan))

    thread = threading.Thread(target=reads)
    thread.start()
    time.sleep(0.3)  # so that it happens during some read
    prefill.signal(number)
    before = len(ends)
    time.sleep(0.3)  # and some begin afterwards
    stop.set()
    thread.join(20)
    assert len(ends) > before > 0
    assert all(np.array_equal(found, wanted) for found in ends)
    pool.fill_(1)
    gpu().torch.cuda.synchronize()
    peer.close()
    assert bool((pool == 1).all())


def test_an_abort_ends_reads_and_the_peer(prefill: Prefill) -> None:
    _, store = own_store()
    source, target = tables(6)
    peer = GpuPeer(prefill.metadata["cuda_ipc"], store)
    plan = blocks(LAYOUT.block_bytes, source, target)
    peer.read(plan)
    peer.abort()
    with pytest.raises(ReadFailed):
        peer.read(plan)
    peer.close()


def test_a_plan_that_leaves_the_pools_or_cuts_a_block_is_refused(prefill: Prefill) -> None:
    pool, store = own_store()
    peer = GpuPeer(prefill.metadata["cuda_ipc"], store)
    for plan in (
        blocks(LAYOUT.block_bytes, [LAYOUT.num_blocks], [0]),
        blocks(LAYOUT.block_bytes, [0], [LAYOUT.num_blocks]),
        blocks(LAYOUT.block_bytes // 2, [0], [0]),
    ):
        with pytest.raises((ValueError, LayoutMismatch), match=r"outside the pool|whole blocks"):
            peer.read(plan)
    assert np.array_equal(bits(pool), bits(content(LAYOUT, SEED + 1, "cpu")))
    peer.close()


def test_a_prefill_that_is_gone_is_refused_with_the_reason(prefill: Prefill) -> None:
    _, store = own_store()
    prefill.signal(signal.SIGKILL)
    with pytest.raises(ReadFailed, match="must live and still hold the pool"):
        GpuPeer(prefill.metadata["cuda_ipc"], store)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_prefill_in_another_pid_namespace_is_read() -> None:
    prefill = Prefill(LAYOUT, SEED, "cuda:0", "unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    pool, store = own_store()
    source, target = tables(7)
    peer = GpuPeer(prefill.metadata["cuda_ipc"], store)
    peer.read(blocks(LAYOUT.block_bytes, source, target))
    assert np.array_equal(bits(pool), expected(source, target))
    peer.close()
    prefill.end()


def test_another_gpu_of_the_host_is_read() -> None:
    if gpu().torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    prefill = Prefill(LAYOUT, SEED, "cuda:1")
    pool, store = own_store()
    source, target = tables(8)
    peer = GpuPeer(prefill.metadata["cuda_ipc"], store)
    hashes = peer.read(blocks(LAYOUT.block_bytes, source, target))
    assert np.array_equal(bits(pool), expected(source, target))
    assert np.array_equal(hashes, prefill.call("hashes", source[np.argsort(target)].tolist()))
    peer.close()
    prefill.end()
