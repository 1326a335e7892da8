"""What the paths with sockets of their own share: frames, the handshake of the control channel, and patience."""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import threading
import time
from collections.abc import Callable

from pdstack.transfer.channel import HANDSHAKE_S, Identity
from pdstack.transfer.errors import ProtocolError, Refused
from pdstack.transfer.roles import Role
from pdstack.transfer.wire import MAX_GREETING, Greeting, Handshake, Message, Seal, dump, encode, frame_length, parse


def receive(sock: socket.socket, nbytes: int, until: float = math.inf) -> bytes:
    """So many bytes. Raises EOFError if the peer closed before they came, BlockingIOError if it was silent.

    `until`, by the monotonic clock, is for strangers: a socket's own limit begins anew with each of their bytes.
    """
    data = b""
    while len(data) < nbytes:  # once, but for a peer that stops in the middle: then the next call says what it is
        if time.monotonic() > until:
            raise BlockingIOError("the peer was too slow")
        more = sock.recv(nbytes - len(data), socket.MSG_WAITALL)
        if not more:
            raise EOFError("the peer closed the stream")
        data += more
    return data


def receive_frame(sock: socket.socket, limit: int, until: float = math.inf) -> bytes:
    """The content of the next frame, of at most `limit` bytes; see :func:`receive`."""
    return receive(sock, frame_length(receive(sock, 4, until), limit), until)


def _send_plain(sock: socket.socket, message: Message) -> None:
    sock.sendall(encode(dump(message), MAX_GREETING))


def _receive_plain(sock: socket.socket, kind: str) -> Message:
    message = parse(receive_frame(sock, MAX_GREETING, time.monotonic() + HANDSHAKE_S))
    if message["type"] != kind:
        raise ProtocolError(f"the peer sent {message['type']!r:.40}, wanted {kind!r}")
    return message


def _check_role(greeting: Greeting, identity: Identity, wanted: Role) -> None:
    if greeting.role != wanted or greeting.audience != identity.audience:
        raise Refused(
            f"{greeting.name!r} is a {greeting.role} worker of {greeting.audience!r}, wanted a {wanted} worker of "
            f"{identity.audience!r}",
            code="role",
        )


def connect(sock: socket.socket, identity: Identity) -> Seal:
    """Decode's half of the handshake; the seal of the frames that follow. Raises a TransferError."""
    hello = identity.greeting()
    _send_plain(sock, hello.message("hello"))
    message = _receive_plain(sock, "welcome")
    welcome = Greeting.parse(message)
    handshake = Handshake(identity.key, hello, welcome)
    handshake.check(message.get("proof"), handshake.prefill_proof, "the prefill agent of this stream")
    _check_role(welcome, identity, Role.PREFILL)
    _send_plain(sock, {"type": "auth", "proof": handshake.decode_proof})
    return handshake.seal(Role.DECODE)


def accept(sock: socket.socket, identity: Identity) -> Seal:
    """Prefill's half of the handshake; the seal of the frames that follow. Raises a TransferError."""
    hello = Greeting.parse(_receive_plain(sock, "hello"))
    _check_role(hello, identity, Role.DECODE)
    welcome = identity.greeting()
    handshake = Handshake(identity.key, hello, welcome)
    _send_plain(sock, welcome.message("welcome", proof=handshake.prefill_proof))
    handshake.check(_receive_plain(sock, "auth").get("proof"), handshake.decode_proof, f"decode agent {hello.name!r}")
    return handshake.seal(Role.PREFILL)


def tune(sock: socket.socket, patience_s: float) -> None:
    """Blocking calls that end after `patience_s` without progress; Python's own timeout would break MSG_WAITALL."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    limit = struct.pack("ll", int(patience_s), int(patience_s % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, limit)


class Server:
    """Listens, and gives every connection to `converse` in a thread of its own; beyond `most` they are closed at once.

    What `converse` raises ends its thread, so it deals with its errors itself. Raises OSError if it cannot listen.
    """

    def __init__(self, name: str, host: str, port: int, most: int, converse: Callable[[socket.socket], None]) -> None:
        self._name, self._most, self._converse = name, most, converse
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        self.closed = False
        self._listener = socket.create_server((host, port), backlog=most)
        self.host, self.port = self._listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._listen, name=name, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # closed
            with self._lock:
                if self.closed or len(self._connections) >= self._most:
                    sock.close()
                    continue
                thread = threading.Thread(target=self._one, args=(sock,), name=f"{self._name}-peer", daemon=True)
                self._connections[sock] = thread
                thread.start()

    def _one(self, sock: socket.socket) -> None:
        try:
            self._converse(sock)
        finally:
            with self._lock:
                self._connections.pop(sock, None)
            sock.close()

    def close(self, wake: Callable[[], None] = lambda: None) -> None:
        """End all connections and wait for their threads; `wake` is called before that, for those that wait."""
        with self._lock:
            self.closed = True
            connections = dict(self._connections)
        wake()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in (self._thread, *connections.values()):
            thread.join()
