"""The path `staged` between two processes' GPU pools, over each host path."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from store_pair import LAYOUT, Prefill, bits, expected, own_store, tables
from store_process import identity

from pdstack.transfer import ReadFailed
from pdstack.transfer.gpu.needs import gpu
from pdstack.transfer.gpu.staging import PinnedStage
from pdstack.transfer.paths import CmaPeer, SharedPeer, StreamPeer
from pdstack.transfer.paths.staged_peer import StagedPeer
from pdstack.transfer.roles import Role

CARRIERS: dict[str, Any] = {
    "shared": SharedPeer,
    "cma": CmaPeer,
    "stream": partial(StreamPeer, identity=identity(Role.DECODE), patience_s=3),
}
# Two slots of 8 MiB here, so that a read of 47 MiB takes each several times.
SLOT = 8 << 20


@pytest.fixture
def prefill() -> Iterator[Prefill]:
    made = Prefill(LAYOUT, 17)
    yield made
    made.end()


def connect(prefill: Prefill, store: Any, carrier: str) -> tuple[StagedPeer, PinnedStage]:
    stage = PinnedStage(store, np.zeros(2 * SLOT, np.uint8), SLOT)
    carriers = {carrier: partial(CARRIERS[carrier], target=stage.region)}
    return StagedPeer(prefill.metadata["staged"], stage, identity(Role.DECODE), carriers, 3), stage


@pytest.mark.parametrize("carrier", CARRIERS)
def test_every_byte_arrives_nothing_else_is_touched_and_the_hashes_are_prefills(prefill: Prefill, carrier: str) -> None:
    pool, store = own_store()
    source, target = tables(11)
    peer, stage = connect(prefill, store, carrier)
    found = peer.read_blocks(source, target)
    assert np.array_equal(bits(pool), expected(source, target))
    assert np.array_equal(found, prefill.call("hashes", source.tolist()))
    assert np.array_equal(found, store.hashes(target))
    peer.close()
    stage.close()


@pytest.mark.parametrize(
    ("carrier", "number"), [("stream", signal.SIGKILL), ("stream", signal.SIGSTOP), ("shared", signal.SIGKILL)]
)
def test_a_lost_prefill_ends_the_read_and_leaves_our_blocks_alone(prefill: Prefill, carrier: str, number: int) -> None:
    pool, store = own_store()
    source, target = tables(12)
    peer, stage = connect(prefill, store, carrier)
    ends: list[Any] = []

    def reads() -> None:
        try:
            while True:
                ends.append(peer.read_blocks(source, target))
        except ReadFailed as error:
            ends.append(error)

    wanted = prefill.call("hashes", source.tolist())
    thread = threading.Thread(target=reads)
    thread.start()
    time.sleep(0.3)  # so that it happens during some read
    prefill.signal(number)
    thread.join(20)
    assert not thread.is_alive()
    assert isinstance(ends.pop(), ReadFailed)
    assert ends
    assert all(np.array_equal(found, wanted) for found in ends)
    pool.fill_(1)
    gpu().torch.cuda.synchronize()
    peer.close()
    if number == signal.SIGSTOP:
        prefill.signal(signal.SIGCONT)
        time.sleep(0.3)  # whatever it still had to send
    assert bool((pool == 1).all())
    stage.close()
