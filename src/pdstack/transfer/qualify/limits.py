"""The limits beside which a pair is measured, in the same rounds: one thread's memcpy, and one plain TCP stream."""

from __future__ import annotations

import contextlib
import ctypes
import hmac
import secrets
import socket
from typing import NamedTuple

from pdstack.transfer.layout import KVLayout, allocate_pool
from pdstack.transfer.paths import Region
from pdstack.transfer.paths.sockets import Server

_TOKEN = 32
# What the socket of a vanished peer may take before the measurement goes on without it.
_PATIENCE_S = 20.0
_CHUNK = 4 << 20
# Decode ends that measure at a time, and strangers.
_MOST = 64


class Address(NamedTuple):
    """Where the plain stream is served, and what to show to be served."""

    host: str
    port: int
    token: str


class Copy:
    """memcpy of `nbytes` within this process, between buffers that were touched before, by one thread."""

    def __init__(self, nbytes: int) -> None:
        self._buffers = [allocate_pool(KVLayout(nbytes, 1, 1, 1, 1, "int8")) for _ in range(2)]
        for value, buffer in enumerate(self._buffers):
            buffer.fill(value)
        self._nbytes = nbytes

    def run(self, nbytes: int) -> None:
        """Copy once."""
        if not 1 <= nbytes <= self._nbytes:
            raise ValueError(f"a memcpy of {nbytes} bytes, the buffers have {self._nbytes}")
        target, source = (buffer.ctypes.data for buffer in self._buffers)
        ctypes.memmove(target, source, nbytes)


class StreamServer:
    """Sends as many bytes as it is asked for to whoever shows the token; the bytes are its own and mean nothing."""

    def __init__(self, host: str, port: int = 0) -> None:
        self._token = secrets.token_bytes(_TOKEN)
        self._content = memoryview(bytes(_CHUNK))
        self._server = Server("limit-stream", host, port, _MOST, self._serve)
        self.address = Address(self._server.host, self._server.port, self._token.hex())

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.settimeout(_PATIENCE_S)
            if not hmac.compare_digest(_exactly(sock, _TOKEN), self._token):
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(None)
            while asked := _exactly(sock, 8):
                left = int.from_bytes(asked, "little")
                while left > 0:
                    left -= sock.send(self._content[: min(left, _CHUNK)])

    def close(self) -> None:
        """Serve nobody any more."""
        self._server.close()


class Stream:
    """One TCP connection to a :class:`StreamServer`: what a plain socket moves between these two processes.

    Raises ConnectionError if there is none.
    """

    def __init__(self, address: Address, target: Region) -> None:
        self._memory = target.bytes()
        try:
            self._sock = socket.create_connection((address.host, address.port), _PATIENCE_S)
        except OSError as error:
            raise ConnectionError(
                f"no plain stream, the limit of this measurement, to {address.host}:{address.port}: {error}; "
                "is the port open between the hosts?"
            ) from error
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.sendall(bytes.fromhex(address.token))

    def run(self, nbytes: int) -> None:
        """Receive `nbytes` into the beginning of the target. Raises OSError if the other end is lost."""
        view = self._memory[:nbytes]
        self._sock.sendall(nbytes.to_bytes(8, "little"))
        while view:
            got = self._sock.recv_into(view)
            if not got:
                raise ConnectionResetError("the plain stream was closed by its server: was it restarted?")
            view = view[got:]

    def close(self) -> None:
        """End the connection."""
        self._sock.close()


def _exactly(sock: socket.socket, nbytes: int) -> bytes:
    """So many bytes, or none if the peer closed."""
    data = b""
    while len(data) < nbytes:
        more = sock.recv(nbytes - len(data))
        if not more:
            return b""
        data += more
    return data
