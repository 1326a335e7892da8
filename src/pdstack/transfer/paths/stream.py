"""Path `stream`: prefill pushes scattered extents over a few TCP sockets, decode receives them where they belong.

For hosts without RDMA. Both ends prove the cluster key with the handshake of the control channel (`wire`), on every
socket; each header is a signed frame in sequence. One read, on each socket::

    decode  -> frame {"type": "read", "extents": n, "digest"}   n x (source offset, bytes), little-endian int64
    prefill -> frame {"type": "data", "extents": k, "hash"}     the bytes of the next k extents
               ... until all n have come (at once, where nothing is hashed)

``digest`` is the request's SHA-256 and ``hash`` the XXH3-64 over the extents' own XXH3-64, both inside signed frames.
One request is on the way while another is answered. Neither side holds more than two requests and one group of
vectors a socket. Bytes are neither encrypted nor, against a forger on the network, authenticated: XXH3 finds faults,
not attacks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import socket
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash

from pdstack.transfer.backends.base import Exporter
from pdstack.transfer.channel import HANDSHAKE_S, Identity
from pdstack.transfer.errors import (
    AuthenticationFailed,
    ChecksumMismatch,
    ProtocolError,
    ReadFailed,
    TransferError,
)
from pdstack.transfer.metadata import NBYTES, Text, Whole, read_metadata
from pdstack.transfer.paths import vectored
from pdstack.transfer.paths.base import PathPeer, Region, hash_pieces
from pdstack.transfer.paths.sockets import Server, accept, connect, receive, receive_frame, tune
from pdstack.transfer.plan import Offsets, Plan, split
from pdstack.transfer.store import HASH_UNIT, Hashes
from pdstack.transfer.wire import Message, Seal, encode

_log = logging.getLogger(__name__)
STREAMS = 2
# Two calls answer a request, and two requests fit the socket buffers: else both ends could wait for each other.
_MAX_EXTENTS = 2 * (vectored.MAX_VECTORS - 1)
_MAX_REQUEST = 64 << 20
# One call's vectors, less one for the header; and what is hashed before it is sent, while it is in the cache.
_MAX_VECTORS = vectored.MAX_VECTORS - 1
_GROUP = 2 << 20
# Decode's threads sleep until so much has come. And so much is on the way between two ends of one host: then the cache
# still holds what prefill's copy wrote when decode's reads it. On a network the kernel's own choice is better.
_AT_ONCE = 64 << 10
_NEAR_BUFFER = 256 << 10
_MAX_HEADER = 4096
_MAX_CONNECTIONS = 64
_ENDED = (OSError, EOFError)


def _count(message: Message, kind: str, most: int) -> int:
    number = message.get("extents")
    if message["type"] != kind or not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= most:
        raise ProtocolError(
            f"the peer sent {message['type']!r:.40} of {number!r:.20} extents, wanted {kind!r} of 1 to {most}"
        )
    return number


def _narrow(sock: socket.socket) -> None:
    if sock.getsockname()[0] == sock.getpeername()[0]:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _NEAR_BUFFER)


def _group_hash(hashes: Hashes) -> str:
    return str(xxhash.xxh3_64_hexdigest(hashes.tobytes()))


def _group_ends(nbytes: Offsets, most: int) -> list[int]:
    """Indices that cut extents into groups of about `most` bytes and no more vectors than a call takes."""
    share = (np.cumsum(nbytes) - 1) // most
    vectors = np.arange(len(nbytes)) // _MAX_VECTORS
    return [*(np.flatnonzero(np.diff(share) | np.diff(vectors)) + 1).tolist(), len(nbytes)]


class StreamExporter(Exporter):
    """Listens for decode's sockets; one thread a socket answers its requests. `advertise`: the host decode is told."""

    def __init__(
        self,
        pool: Region,
        identity: Identity,
        host: str,
        port: int = 0,
        patience_s: float = 20.0,
        *,
        advertise: str | None = None,
    ) -> None:
        self._pool, self._identity, self._patience_s = pool, identity, patience_s
        self._memory = pool.bytes().toreadonly()
        self._server = Server("kv-stream", host, port, _MAX_CONNECTIONS, self._converse)
        where = {"host": advertise or self._server.host, "port": self._server.port}
        self._metadata = json.dumps({**where, "nbytes": pool.nbytes}).encode()

    def metadata(self) -> bytes:
        """Where to connect, and the pool's size, as JSON. No secret: the handshake asks for the cluster key."""
        return self._metadata

    def tend(self) -> None:
        """Nothing to do."""

    def _converse(self, sock: socket.socket) -> None:
        try:
            tune(sock, HANDSHAKE_S)
            _narrow(sock)
            seal = accept(sock, self._identity)
            tune(sock, self._patience_s)
            while True:
                try:
                    sock.recv(1, socket.MSG_PEEK)  # an idle connection may be silent for as long as it likes
                except BlockingIOError:
                    continue
                self._answer(sock, seal)
        except EOFError:
            pass  # decode closed its end
        except (OSError, TransferError) as error:
            _log.info("a KV stream ended: %s", error)

    def _answer(self, sock: socket.socket, seal: Seal) -> None:
        message = seal.check(receive_frame(sock, _MAX_HEADER))
        number = _count(message, "read", _MAX_EXTENTS)
        request = receive(sock, number * 16)
        if hashlib.sha256(request).hexdigest() != message.get("digest"):
            raise AuthenticationFailed("a read request was altered on its way")
        offsets, nbytes = np.frombuffer(request, "<i8").reshape(number, 2).T.astype(np.int64)
        # Compared without adding: a forged size must not wrap around.
        if offsets.min() < 0 or nbytes.min() < 1 or np.any(nbytes > self._pool.nbytes - offsets):
            raise ProtocolError(f"a read leaves the pool of {self._pool.nbytes} bytes")
        if int(nbytes.max()) > _GROUP or nbytes.sum() > _MAX_REQUEST:
            raise ProtocolError("a read is larger than one request may be")
        hashed = message.get("checksum") is True
        begin = 0
        for end in _group_ends(nbytes, _GROUP) if hashed else [number]:
            mine = slice(begin, end)
            header: dict[str, Any] = {"type": "data", "extents": end - begin}
            if hashed:
                header["hash"] = _group_hash(hash_pieces(self._memory, offsets[mine], nbytes[mine]))
            head = np.frombuffer(encode(seal.sign(header), _MAX_HEADER), np.uint8)
            first = np.array([[head.ctypes.data, len(head)]], np.uint64)
            body = vectored.vectors_of(self._pool.address, offsets[mine], nbytes[mine])
            vectored.send(sock, np.concatenate((first, body)))
            begin = end

    def close(self) -> None:
        """End all streams; nothing of the pool is read or sent afterwards, so its memory may go."""
        self._server.close()


class StreamPeer(PathPeer):
    """The sockets to one exporter. A read that fails closes them: nothing that is still on its way can land."""

    name = "stream"

    def __init__(
        self, metadata: bytes, target: Region, identity: Identity, streams: int = STREAMS, patience_s: float = 20.0
    ) -> None:
        values = read_metadata(metadata, "stream", host=Text(255), port=Whole(1, 65535), nbytes=NBYTES)
        where, self._nbytes = (values["host"], values["port"]), values["nbytes"]
        self._target, self._memory = target, target.bytes()
        self._patience_s = patience_s
        self._aborted = threading.Event()
        self._ends: list[tuple[socket.socket, Seal]] = []
        self._pool = ThreadPoolExecutor(streams, thread_name_prefix="kv-stream-receive")
        try:
            for _ in range(streams):
                sock = socket.create_connection(where, HANDSHAKE_S)
                try:
                    sock.settimeout(None)
                    tune(sock, HANDSHAKE_S)
                    _narrow(sock)
                    self._ends.append((sock, connect(sock, identity)))
                    tune(sock, patience_s)
                except BaseException:
                    sock.close()
                    raise
        except (*_ENDED, UnicodeError) as error:  # UnicodeError: not the name of a host
            self.close()
            raise ReadFailed(
                f"no KV stream to {where[0]}:{where[1]}: {error}; is the port open between the hosts, and is the "
                "cluster key the same?"
            ) from error
        except TransferError:
            self.close()
            raise

    def read(self, plan: Plan, *, checksum: bool = True) -> Hashes | None:
        """See the base class. Also raises :class:`ChecksumMismatch`: every group is verified as it arrives."""
        plan.within(self._nbytes, self._target.nbytes)
        if self._aborted.is_set() or not self._ends:
            raise ReadFailed("this KV stream is closed")
        pieces = split(plan, HASH_UNIT if checksum else _GROUP)
        hashes = np.zeros(len(pieces), np.uint64) if checksum else None
        ends = self._ends
        # Equal shares of bytes: each socket takes one contiguous part of the pieces.
        marks = np.searchsorted(np.cumsum(pieces.nbytes), np.arange(1, len(ends)) * (pieces.total / len(ends)))
        edges = [0, *marks.tolist(), len(pieces)]
        parts = [(*end, pieces, slice(*edge), hashes) for end, edge in zip(ends, pairwise(edges), strict=True)]
        shares = [part for part in parts if part[3].stop > part[3].start]
        # The calling thread takes one share itself: that saves a change of threads.
        others = [self._pool.submit(self._take, *share) for share in shares[1:]]
        ended = [self._take(*share) for share in shares[:1]] + [other.result() for other in others]
        errors = [error for error in ended if error is not None]
        if not errors:
            return hashes
        # The share that failed first cut off the others, whose own errors say no more than that.
        telling = (TransferError, BlockingIOError)
        first = next((error for kind in telling for error in errors if isinstance(error, kind)), errors[0])
        self.close()
        if isinstance(first, TransferError):
            raise first
        if isinstance(first, _ENDED):
            silent = isinstance(first, BlockingIOError)
            why = f"was cut off: {f'the peer was silent for {self._patience_s:.0f} s' if silent else first}"
            if self._aborted.is_set():
                why = "was aborted"
            raise ReadFailed(f"the read over the KV stream {why}") from first
        raise first

    def _take(
        self, sock: socket.socket, seal: Seal, pieces: Plan, mine: slice, hashes: Hashes | None
    ) -> BaseException | None:
        """Read one share; an error is returned, because the other shares have to end before it may be raised."""
        try:
            waiting: deque[slice] = deque()
            for request in _requests(pieces.nbytes, mine):
                self._ask(sock, seal, pieces, request, hashes is not None)
                waiting.append(request)
                if len(waiting) == 2:
                    self._fill(sock, seal, pieces, waiting.popleft(), hashes)
            while waiting:
                self._fill(sock, seal, pieces, waiting.popleft(), hashes)
        except BaseException as error:
            self._cut()  # the other sockets' shares are worth nothing now, so they need not be waited for
            return error
        return None

    @staticmethod
    def _ask(sock: socket.socket, seal: Seal, pieces: Plan, request: slice, checksum: bool) -> None:
        body = np.stack((pieces.source[request], pieces.nbytes[request]), axis=1).astype("<i8").tobytes()
        header = {"type": "read", "extents": request.stop - request.start, "checksum": checksum}
        header["digest"] = hashlib.sha256(body).hexdigest()
        sock.sendall(encode(seal.sign(header), _MAX_HEADER) + body)

    def _fill(self, sock: socket.socket, seal: Seal, pieces: Plan, request: slice, hashes: Hashes | None) -> None:
        begin = request.start
        while begin < request.stop:
            message = seal.check(receive_frame(sock, _MAX_HEADER))
            end = begin + _count(message, "data", request.stop - begin)
            offsets, nbytes = pieces.target[begin:end], pieces.nbytes[begin:end]
            vectored.receive(sock, vectored.vectors_of(self._target.address, offsets, nbytes), _AT_ONCE)
            if hashes is not None:
                hashes[begin:end] = hash_pieces(self._memory, offsets, nbytes)
                if message.get("hash") != _group_hash(hashes[begin:end]):
                    raise ChecksumMismatch(
                        f"{end - begin} extents arrived over the KV stream with another hash than prefill sent "
                        "with them: they were altered on the way and not used"
                    )
            begin = end

    def _cut(self) -> None:
        for sock, _ in self._ends:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def abort(self) -> None:
        """See the base class."""
        self._aborted.set()
        self._cut()

    def close(self) -> None:
        """See the base class."""
        ends, self._ends = self._ends, []
        for sock, _ in ends:
            sock.close()
        self._pool.shutdown()


def _requests(nbytes: Offsets, mine: slice) -> list[slice]:
    """`mine` cut into requests that are not too long and not too large."""
    share = (np.cumsum(nbytes[mine]) - 1) // (_MAX_REQUEST - _GROUP)
    cuts = (np.flatnonzero(np.diff(share)) + 1).tolist()
    requests = []
    for begin, end in zip([0, *cuts], [*cuts, len(share)], strict=True):
        edges = [*range(begin, end, _MAX_EXTENTS), end]
        requests += [slice(mine.start + a, mine.start + b) for a, b in pairwise(edges)]
    return requests
