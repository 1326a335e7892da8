"""Scattered pieces through real sockets, whatever the kernel takes of them a call."""

from __future__ import annotations

import socket
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdstack.transfer.paths import vectored


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.data())
def test_advance_leaves_exactly_the_bytes_that_were_not_moved(sizes: list[int], data: st.DataObject) -> None:
    offsets = np.cumsum([3, *(np.array(sizes[:-1], np.int64) + 2)])
    vectors = vectored.vectors_of(1000, offsets, np.array(sizes))
    places = [int(begin) + i for begin, size in vectors.tolist() for i in range(size)]
    done = data.draw(st.integers(0, len(places)))
    left = vectored.advance(vectors, done)
    assert [int(begin) + i for begin, size in left.tolist() for i in range(size)] == places[done:]
    assert (left[:, 1] > 0).all()


def test_thousands_of_pieces_arrive_where_they_belong_through_a_narrow_socket() -> None:
    near, far = socket.socketpair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 5000)
    rng = np.random.default_rng(4)
    sizes = rng.integers(1, 3000, 3000)
    source = rng.integers(0, 255, int(sizes.sum()) + 3000, np.uint8)
    target = np.zeros_like(source)
    begins = np.cumsum(sizes + 1) - sizes - 1
    order = rng.permutation(3000)
    from_ = vectored.vectors_of(source.ctypes.data, begins[order], sizes[order])
    to = vectored.vectors_of(target.ctypes.data, begins[order], sizes[order])
    thread = threading.Thread(target=vectored.send, args=(near, from_))
    thread.start()
    vectored.receive(far, to)
    thread.join()
    gaps = begins + sizes
    assert not target[gaps].any()
    source[gaps] = 0
    assert np.array_equal(source, target)


@pytest.mark.parametrize("at_once", [2, 5000, 1 << 20])
def test_a_patient_receiver_sleeps_through_crumbs_and_still_gets_the_last_of_them(at_once: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    source = np.random.default_rng(1).integers(0, 255, 200_000, np.uint8)
    target = np.zeros_like(source)
    begins, sizes = np.arange(200) * 1000, np.full(200, 1000)
    vectors = vectored.vectors_of(target.ctypes.data, begins, sizes)
    asked: list[int] = []

    class Watched(socket.socket):
        def setsockopt(self, *args: object) -> None:  # type: ignore[override]
            asked.append(args[-1])  # type: ignore[arg-type]
            super().setsockopt(*args)  # type: ignore[call-overload]

    watched = Watched(fileno=far.detach())
    thread = threading.Thread(target=vectored.receive, args=(watched, vectors, at_once))
    thread.start()
    for part in np.array_split(source, 300):
        near.sendall(part.tobytes())
    thread.join(10)
    assert not thread.is_alive()
    assert np.array_equal(source, target)
    assert asked == ([at_once, 1] if at_once < len(source) else [])
    assert watched.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
    near.close()
    watched.close()


def test_a_closed_peer_and_a_closed_socket_are_told() -> None:
    near, far = socket.socketpair()
    memory = np.zeros(10, np.uint8)
    vectors = vectored.vectors_of(memory.ctypes.data, np.array([0]), np.array([10]))
    near.sendall(b"abc")
    near.close()
    with pytest.raises(EOFError):
        vectored.receive(far, vectors)
    assert bytes(memory) == b"abc" + bytes(7)
    with pytest.raises(BrokenPipeError):
        vectored.send(far, vectors)
    far.close()
    with pytest.raises(OSError):
        vectored.receive(far, vectors)
