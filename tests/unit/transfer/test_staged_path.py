"""The path `staged` over each of its carriers: bytes, hashes, few slots for many readers, ends that fail."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy_stage import NumpyStage
from path_pair import identity

from pdstack.transfer.errors import AuthenticationFailed, LayoutMismatch, ReadFailed
from pdstack.transfer.gpu import checksum
from pdstack.transfer.layout import KVLayout, allocate_pool
from pdstack.transfer.paths import CmaPeer, SharedPeer, StreamPeer
from pdstack.transfer.paths.offers import Offers
from pdstack.transfer.paths.sockets import connect, receive_frame
from pdstack.transfer.paths.staged import StagedExporter
from pdstack.transfer.paths.staged_peer import StagedPeer
from pdstack.transfer.plan import blocks as block_plan
from pdstack.transfer.roles import Role
from pdstack.transfer.store import HostStore
from pdstack.transfer.wire import encode

SIZE, COUNT, SLOT = 4096, 300, 16 * 4096
CARRIERS = ("shared", "cma", "stream")


def memory(slots: int) -> HostStore:
    layout = KVLayout(slots, 1, 1, 1, SLOT // 2, "uint8")
    return HostStore(layout, allocate_pool(layout, "auto"))


def stage(pool: Any, store: HostStore) -> NumpyStage:
    return NumpyStage(pool, store.pool.reshape(-1).view(np.uint8), SLOT)


class Both:
    """Both ends in this process; the sockets, the shared memory and the copies are real."""

    def __init__(self, slots: int = 2, patience_s: float = 5.0) -> None:
        rng = np.random.default_rng(5)
        self.source = rng.integers(0, 256, (COUNT, SIZE), dtype=np.uint8)
        self.target = rng.integers(0, 256, (COUNT, SIZE), dtype=np.uint8)
        staging = memory(slots)
        self.prefill = stage(self.source, staging)
        self.decode = stage(self.target, memory(slots))
        prefill = identity(Role.PREFILL)
        carriers = Offers.open("auto", staging, prefill, listen_host="127.0.0.1", advertise="127.0.0.1", patience_s=5)
        self.exporter = StagedExporter(
            self.prefill, carriers, prefill, "127.0.0.1", advertise="127.0.0.1", patience_s=patience_s
        )
        self.peers: list[StagedPeer] = []

    def connect(self, *names: str, patience_s: float = 5.0, key: bytes = b"k" * 32) -> StagedPeer:
        region = self.decode.region
        who = identity(key=key)
        makers: dict[str, Any] = {
            "shared": lambda metadata: SharedPeer(metadata, region),
            "cma": lambda metadata: CmaPeer(metadata, region),
            "stream": lambda metadata: StreamPeer(metadata, region, who),
        }
        given = {name: makers[name] for name in names or CARRIERS}
        peer = StagedPeer(self.exporter.metadata(), self.decode, who, given, patience_s)
        self.peers.append(peer)
        return peer

    def request(self) -> tuple[socket.socket, Any]:
        """A connection by hand."""
        values = json.loads(self.exporter.metadata())
        sock = socket.create_connection((values["host"], values["port"]), 5)
        return sock, connect(sock, identity())


@pytest.fixture
def both() -> Iterator[Both]:
    made = Both()
    yield made
    for peer in made.peers:
        peer.close()
    made.exporter.close()
    assert made.prefill.closed


def tables(seed: int, count: int = 250) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.permutation(COUNT)[:count], rng.permutation(COUNT)[:count]


@pytest.mark.parametrize("adopts", [True, False])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_every_byte_arrives_and_the_hashes_are_those_of_prefills_blocks(both: Both, carrier: str, adopts: bool) -> None:
    both.decode.adopts = adopts
    source, target = tables(1)
    wanted = both.target.copy()
    wanted[target] = both.source[source]
    peer = both.connect(carrier)
    assert peer.carrier == carrier
    found = peer.read_blocks(source, target)
    assert np.array_equal(both.target, wanted)
    assert found is not None
    assert np.array_equal(found, checksum.block_sums(both.source, source, None))
    assert len(both.decode.adopted) == (adopts and carrier == "shared")
    peer.close()
    assert not both.decode.adopted


def test_a_plan_is_read_in_its_own_order(both: Both) -> None:
    source, target = tables(2, 40)
    found = both.connect().read(block_plan(SIZE, source, target))
    order = np.argsort(target)
    assert found is not None
    assert np.array_equal(found, checksum.block_sums(both.source, source[order], None))
    assert both.connect().read_blocks(np.zeros(0, np.int64), np.zeros(0, np.int64), checksum=False) is None


def test_the_first_carrier_that_connects_is_taken_and_without_one_it_is_said_why(both: Both) -> None:
    assert both.connect().carrier == "shared"
    with pytest.raises(ReadFailed, match="it offers none of ours"):
        StagedPeer(both.exporter.metadata(), both.decode, identity(), {})


def test_many_readers_share_few_slots_and_none_starves(both: Both) -> None:
    """More readers than slots on both ends, each with more rounds than slots."""
    peers = [both.connect(CARRIERS[number % 3]) for number in range(6)]
    wanted = [checksum.block_sums(both.source, tables(number, 48)[0], None) for number in range(6)]

    def reads(number: int) -> list[Any]:
        # Own targets for each reader: they would race for one block.
        target = np.arange(48) + 50 * number
        return [peers[number].read_blocks(tables(number, 48)[0], target) for _ in range(10)]

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(reads, range(6)))
    assert all(np.array_equal(one, wanted[number]) for number, each in enumerate(found) for one in each)


def test_a_block_that_changed_after_hashing_shows(both: Both) -> None:
    before = checksum.block_sums(both.source, range(100), None)
    both.source[42, 99] ^= 8
    found = both.connect().read_blocks(np.arange(100), np.arange(100))
    assert list(np.flatnonzero(found != before)) == [42]


def test_a_reader_that_freezes_with_a_slot_loses_it(both: Both) -> None:
    both.exporter.close()
    slow = Both(slots=1, patience_s=0.5)
    sock, seal = slow.request()
    body = np.zeros(1, "<i8").tobytes()
    frame = {"type": "stage", "blocks": 1, "digest": hashlib.sha256(body).hexdigest()}
    sock.sendall(encode(seal.sign(frame), 4096) + body)
    assert seal.check(receive_frame(sock, 4096)) == {"type": "staged", "slot": 0}
    # It says nothing more. The only slot comes back, and another is served.
    found = slow.connect("shared").read_blocks(np.arange(20), np.arange(20))
    assert np.array_equal(found, checksum.block_sums(slow.source, range(20), None))
    assert sock.recv(1) == b""
    sock.close()
    slow.exporter.close()


@pytest.mark.parametrize(
    "message",
    [
        {"type": "free", "slot": 0},
        {"type": "free", "slot": True},
        {"type": "free"},
        {"type": "stage", "blocks": 0, "digest": ""},
        {"type": "stage", "blocks": 17, "digest": ""},
        {"type": "stage", "blocks": 1, "digest": "00"},
        {"type": "stage", "blocks": 1, "digest": hashlib.sha256(np.array([COUNT]).tobytes()).hexdigest()},
        {"type": "other"},
    ],
)
def test_what_is_no_request_ends_the_connection_and_keeps_no_slot(both: Both, message: dict[str, Any]) -> None:
    sock, seal = both.request()
    sock.sendall(encode(seal.sign(message), 4096) + np.array([COUNT]).tobytes())
    with pytest.raises((EOFError, ConnectionError)):
        receive_frame(sock, 4096)
    sock.close()
    assert both.connect().read_blocks(np.arange(64), np.arange(64)) is not None


def test_a_reader_without_the_key_gets_nothing(both: Both) -> None:
    with pytest.raises((AuthenticationFailed, ReadFailed)):
        both.connect("shared", key=b"x" * 32)


def test_an_abort_ends_a_read_that_waits_and_gives_its_slots_back(both: Both) -> None:
    """Prefill is frozen: it has no free slot and answers nothing."""
    taken = [both.prefill.slots.take(1, lambda: False) for _ in range(2)]
    peer = both.connect(patience_s=30)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(peer.read_blocks, np.arange(64), np.arange(64))
        time.sleep(0.2)  # until it waits for the answer
        start = time.monotonic()
        peer.abort()
        with pytest.raises(ReadFailed, match="aborted"):
            read.result(5)
        assert time.monotonic() - start < 2
    with pytest.raises(ReadFailed, match="closed"):
        peer.read_blocks(np.arange(1), np.arange(1))
    for slot in taken:
        assert slot is not None
        both.prefill.slots.give(slot)
    assert both.connect().read_blocks(np.arange(64), np.arange(64)) is not None


def test_a_silent_prefill_is_given_up_after_the_time_of_patience(both: Both) -> None:
    taken = [both.prefill.slots.take(1, lambda: False) for _ in range(2)]
    assert None not in taken
    with pytest.raises(ReadFailed, match="silent for"):
        both.connect(patience_s=0.3).read_blocks(np.arange(4), np.arange(4))


def test_closing_prefill_ends_reads_at_once_even_those_that_wait_for_a_slot(both: Both) -> None:
    taken = [both.prefill.slots.take(1, lambda: False) for _ in range(2)]
    assert None not in taken
    peer = both.connect(patience_s=30)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(peer.read_blocks, np.arange(64), np.arange(64))
        time.sleep(0.2)  # until it waits for the answer
        start = time.monotonic()
        closing = threading.Thread(target=both.exporter.close)
        closing.start()
        with pytest.raises(ReadFailed, match="cut off"):
            read.result(5)
        closing.join(5)
        assert time.monotonic() - start < 3


def test_blocks_outside_the_pools_are_refused_before_anything_is_asked(both: Both) -> None:
    before = both.target.copy()
    with pytest.raises(LayoutMismatch, match="outside the peer's pool"):
        both.connect().read_blocks(np.array([COUNT]), np.array([0]))
    with pytest.raises(LayoutMismatch, match="wanted equal numbers"):
        both.connect().read_blocks(np.array([1, 2]), np.array([0]))
    for target in ([COUNT], [5, 5]):
        with pytest.raises(LayoutMismatch):
            both.connect().read_blocks(np.arange(len(target)), np.array(target))
    assert np.array_equal(both.target, before)


@pytest.mark.parametrize(
    "metadata", [b"", b"{}", b'{"host": "h", "port": 1, "blocks": 1, "slot_bytes": 0, "nbytes": 1}']
)
def test_other_metadata_is_refused(both: Both, metadata: bytes) -> None:
    with pytest.raises(ReadFailed, match="cannot be read"):
        StagedPeer(metadata, both.decode, identity(), {})


def test_a_slot_holds_at_least_a_block() -> None:
    with pytest.raises(LayoutMismatch, match="make slots that hold a block"):
        NumpyStage(np.zeros((2, 8192), np.uint8), np.zeros(8192, np.uint8), 4096)
