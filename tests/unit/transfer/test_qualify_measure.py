"""What the measurement of a pair rests on: it sees every wrong byte, and its limits move what they say."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from path_pair import identity

from pdstack.transfer.errors import ReadFailed
from pdstack.transfer.paths import Region
from pdstack.transfer.plan import Plan
from pdstack.transfer.qualify.limits import Address, Copy, Stream, StreamServer
from pdstack.transfer.qualify.measure import (
    Bytes,
    Case,
    Measured,
    Reader,
    attempt,
    case,
    fill,
    measure,
    open_reader,
    values,
    wrong_blocks,
)
from pdstack.transfer.transport import Transport

READ = 64 << 10
fast = settings(derandomize=True, deadline=None, max_examples=60)


def pool(value: int = 0xA5) -> Bytes:
    return np.full(2 * READ, value, np.uint8)


def source(owner: int) -> Bytes:
    found = pool()
    fill(found, owner)
    return found


class Honest(Reader):
    """Copies within this process, as the plan says."""

    def __init__(self, source: Bytes, target: Bytes) -> None:
        self.source, self.target, self.closed = source, target, False

    def read(self, plan: Plan, *, checksum: bool) -> None:
        for begin, to, size in zip(plan.source, plan.target, plan.nbytes, strict=True):
            self.target[to : to + size] = self.source[begin : begin + size]

    def transport(self, nbytes: int) -> Transport:
        return Transport("honest", "")

    def close(self) -> None:
        self.closed = True


def moved(one: Case, owner: int) -> Bytes:
    target = pool()
    Honest(source(owner), target).read(one.plan, checksum=False)
    return target


sizes = st.sampled_from([8, 24, 512, 4096, 24 << 10, READ])


@fast
@given(sizes, st.integers(0, 99), st.integers(1, 99))
def test_a_right_read_has_no_wrong_block_and_moves_what_it_says(size: int, seed: int, owner: int) -> None:
    one = case(size, READ, seed)
    assert wrong_blocks(moved(one, owner), one, owner) == 0
    assert one.plan.total == READ // size * size


@fast
@given(sizes, st.integers(0, 99), st.data())
def test_any_changed_byte_is_seen_moved_or_not(size: int, seed: int, data: st.DataObject) -> None:
    one = case(size, READ, seed)
    target = moved(one, 1)
    at = data.draw(st.integers(0, 2 * READ // size * size - 1))
    target[at] ^= data.draw(st.integers(1, 255))
    assert wrong_blocks(target, one, 1) == 1


def test_the_bytes_of_another_prefill_are_wrong() -> None:
    one = case(4096, READ, 5)
    assert wrong_blocks(moved(one, 1), one, 2) == READ // 4096


def test_owners_and_places_all_differ() -> None:
    words = np.concatenate([values(np.arange(1 << 12, dtype=np.uint64), owner) for owner in range(32)])
    assert len(np.unique(words)) == len(words)


@pytest.mark.parametrize("size", [0, 4, 12, 2 * READ])
def test_a_block_size_that_cannot_be_measured_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="wanted a multiple of 8"):
        case(size, READ, 1)


def test_a_measurement_has_ratios_to_all_limits_and_survives_json() -> None:
    target = pool()
    limits = {"memcpy": Copy(READ), "again": Copy(READ)}
    cases = [case(size, READ, 3) for size in (4096, 32 << 10)]
    found = measure("mine", Honest(source(7), target), target, cases, 7, 3, limits)
    assert found.usable and found.transport == "honest"
    assert [size.block_bytes for size in found.sizes] == [4096, 32 << 10]
    for size in found.sizes:
        assert set(size.ratios) == set(size.limits) == {"memcpy", "again"}
        assert 0 < size.gbps.low <= size.gbps.median <= size.gbps.high
    assert Measured.parse(json.loads(json.dumps(dataclasses.asdict(found)))) == found


def test_a_path_that_brings_wrong_bytes_is_not_timed() -> None:
    target = pool()
    found = measure("mine", Honest(source(7), target), target, [case(4096, READ, 3)], 8, 3, {})
    assert found.wrong == READ // 4096 and not found.usable and not found.sizes


def test_a_failure_is_a_result_with_its_reason() -> None:
    def fails() -> Measured:
        raise ReadFailed("the wire is cut")

    found = attempt("mine", fails)
    assert found.error == "the wire is cut (read_failed)" and not found.usable


@pytest.fixture
def server() -> Iterator[StreamServer]:
    found = StreamServer("127.0.0.1")
    yield found
    found.close()


def test_the_plain_stream_moves_as_many_bytes_as_asked(server: StreamServer) -> None:
    target = np.full(9 << 20, 7, np.uint8)
    stream = Stream(server.address, Region.of(target))
    for nbytes in (1, 5 << 20, 9 << 20):
        target[:] = 7
        stream.run(nbytes)
        assert not target[:nbytes].any() and (target[nbytes:] == 7).all()
    stream.close()


def test_the_plain_stream_serves_nobody_without_the_token(server: StreamServer) -> None:
    with socket.create_connection((server.address.host, server.address.port)) as sock:
        sock.settimeout(10)
        sock.sendall(b"\0" * 32 + (1 << 10).to_bytes(8, "little"))
        with pytest.raises(ConnectionResetError):  # closed with the request unread
            assert sock.recv(1) == b""
            raise ConnectionResetError


def test_a_stream_that_ends_is_an_error(server: StreamServer) -> None:
    target = pool()
    stream = Stream(Address(server.address.host, server.address.port, "00" * 32), Region.of(target))
    with pytest.raises(OSError):
        stream.run(8)
    stream.close()


def test_a_copy_longer_than_its_buffers_is_refused() -> None:
    with pytest.raises(ValueError, match="the buffers have 4096"):
        Copy(4096).run(4097)


def test_a_gpu_path_wants_a_gpu_pool() -> None:
    with pytest.raises(ValueError, match="reads into GPU memory"):
        open_reader("cuda_ipc", b"", np.zeros(4096, np.uint8), 4096, identity())
