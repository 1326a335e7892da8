"""Sending and receiving of many scattered pieces by their addresses.

Python's own ``sendmsg`` and ``recvmsg_into`` want an object a piece, which costs as much as moving 4 KiB; here the
vectors are an array that numpy fills.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from typing import Any

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.uint64]  # (pieces, 2): address and length, as struct iovec

MAX_VECTORS = 1024  # the kernel's limit a call (UIO_MAXIOV)
_libc = ctypes.CDLL(None, use_errno=True)


class _Message(ctypes.Structure):
    """``struct msghdr`` of recvmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


for _call in (_libc.sendmsg, _libc.recvmsg):
    _call.argtypes = (ctypes.c_int, ctypes.POINTER(_Message), ctypes.c_int)
    _call.restype = ctypes.c_ssize_t


def vectors_of(base: int, offsets: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64]) -> Vectors:
    """The vectors of pieces of a region that begins at `base`."""
    vectors = np.empty((len(nbytes), 2), np.uint64)
    vectors[:, 0], vectors[:, 1] = offsets + base, nbytes
    return vectors


def send(sock: socket.socket, vectors: Vectors) -> None:
    """Send all pieces over a blocking socket. Raises OSError."""
    _move(_libc.sendmsg, sock, vectors, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket, vectors: Vectors, at_once: int = 1) -> None:
    """Fill all pieces from a blocking socket. Raises OSError, and EOFError if the peer closes before they are full.

    The thread is woken for `at_once` bytes or more, and not by each segment: on loopback, where each wake-up takes a
    core from the sender, that is a quarter of the time. The last of them are waited for one by one as ever.
    """
    ends = np.cumsum(vectors[:, 1].astype(np.int64))
    patient = int(np.searchsorted(ends, int(ends[-1]) - at_once, side="right")) if at_once > 1 and len(ends) else 0
    if patient:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, at_once)
        try:
            _move(_libc.recvmsg, sock, vectors[:patient], socket.MSG_WAITALL)
        finally:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    _move(_libc.recvmsg, sock, vectors[patient:], socket.MSG_WAITALL)


def _move(call: Any, sock: socket.socket, left: Vectors, flags: int) -> None:
    while len(left):
        now = left[:MAX_VECTORS]
        message = _Message(vectors=now.ctypes.data, count=len(now))
        done = call(sock.fileno(), ctypes.byref(message), flags)
        if done < 0:
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            raise OSError(code, os.strerror(code))
        if done == 0:
            raise EOFError("the peer closed the stream")
        left = advance(left, done)


def advance(vectors: Vectors, done: int) -> Vectors:
    """What is left of `vectors` after their first `done` bytes."""
    ends = np.cumsum(vectors[:, 1].astype(np.int64))
    whole = int(np.searchsorted(ends, done, side="right"))
    left = vectors[whole:]
    if len(left) and (cut := done - int(ends[whole - 1] if whole else 0)):
        left = left.copy()
        left[0] += np.array([cut, 0], np.uint64)
        left[0, 1] -= np.uint64(cut)
    return left
