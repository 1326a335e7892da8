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
