"""Path `staged`: between GPU pools that cannot map each other, through host memory of both ends, one run at a time.

Prefill gathers the blocks that decode asks for into a slot of its staging memory; decode brings the slot over as one
extent by a path of host memory, the *carrier* (shared or cma on one host, stream to another), and scatters it into its
own pool, with the blocks' hashes in the same pass. Slots are few: staging memory does not grow with peers or prompts.
The requests have a connection of their own, with the handshake of the control channel::

    decode  -> frame {"type": "stage", "blocks": n, "digest"}   n block numbers, little-endian int64
    prefill -> frame {"type": "staged", "slot": k}              the blocks are in slot k, one behind the other
    decode  -> frame {"type": "free", "slot": k}

Two requests are on the way at a time. A decode that holds a slot and says nothing for the time of patience loses the
connection, and so the slot. It would then read another's blocks from it: their hashes are not the ones it waits for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import socket
import threading
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from pdstack.transfer.backends.base import Exporter
from pdstack.transfer.channel import HANDSHAKE_S, Identity
from pdstack.transfer.errors import AuthenticationFailed, LayoutMismatch, ProtocolError, ReadFailed, TransferError
from pdstack.transfer.metadata import NBYTES, Kind, Text, Texts, Whole, read_metadata
from pdstack.transfer.paths.base import PathPeer, aborted
from pdstack.transfer.paths.blocks import BlockPeer
from pdstack.transfer.paths.sockets import accept, connect, receive, receive_frame, tune
from pdstack.transfer.paths.stage import Stage
from pdstack.transfer.plan import Offsets, Plan
from pdstack.transfer.store import Hashes
from pdstack.transfer.wire import Message, Seal, encode

_log = logging.getLogger(__name__)
_ASKED_AHEAD = 2
_MAX_HEADER = 4096
_MAX_CONNECTIONS = 64
_ENDED = (OSError, EOFError)
_FIELDS: dict[str, Kind] = {
    "host": Text(255),
    "port": Whole(1, 65535),
    "blocks": NBYTES,
    "slot_bytes": NBYTES,
    "nbytes": NBYTES,
    "carriers": Texts(8192),
}


class Carriers(Protocol):
    """The exporters of a stage's memory (`offers.Offers`)."""

    def wire(self) -> dict[str, str]:
        """Each path's metadata in base64."""

    def close(self) -> None:
        """End them."""


def _whole(message: Message, field: str, low: int, high: int) -> int:
    number = message.get(field)
    if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
        raise ProtocolError(
            f"the peer sent {message['type']!r:.40} with {field} {number!r:.20}, wanted {low} to {high}"
        )
    return number


class StagedExporter(Exporter):
    """Listens for decode's requests, a thread a connection. Closes `carriers` and `stage` with itself.

    `advertise` is the host that decode is told; a silent decode that holds a slot is waited for `patience_s`.
    """

    def __init__(
        self,
        stage: Stage,
        carriers: Carriers,
        identity: Identity,
        host: str,
        port: int = 0,
        *,
        advertise: str,
        patience_s: float = 20.0,
    ) -> None:
        self._stage, self._carriers = stage, carriers
        self._identity, self._patience_s = identity, patience_s
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._listener = socket.create_server((host, port), backlog=_MAX_CONNECTIONS)
        values = {"host": advertise, "port": self._listener.getsockname()[1], "blocks": stage.num_blocks}
        values |= {"slot_bytes": stage.slot_bytes, "nbytes": stage.region.nbytes, "carriers": carriers.wire()}
        self._metadata = json.dumps(values).encode()
        self._thread = threading.Thread(target=self._listen, name="kv-staged", daemon=True)
        self._thread.start()

    def metadata(self) -> bytes:
        """Where to ask, the pool's blocks, the staging memory, and the metadata of each carrier, as JSON."""
        return self._metadata

    def tend(self) -> None:
        """Nothing to do."""

    def _listen(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # closed
            with self._lock:
                if self._closed or len(self._connections) >= _MAX_CONNECTIONS:
                    sock.close()
                    continue
                thread = threading.Thread(target=self._converse, args=(sock,), name="kv-staged-gather", daemon=True)
                self._connections[sock] = thread
                thread.start()

    def _converse(self, sock: socket.socket) -> None:
        held: set[int] = set()
        try:
            tune(sock, HANDSHAKE_S)
            seal = accept(sock, self._identity)
            tune(sock, self._patience_s)
            self._serve(sock, seal, held)
        except EOFError:
            pass  # decode closed its end
        except BlockingIOError:
            _log.warning("a decode worker held %d staging slots and was silent: they were taken back", len(held))
        except (OSError, TransferError) as error:
            _log.info("a staging connection ended: %s", error)
        finally:
            for slot in held:
                self._stage.slots.give(slot)
            with self._lock:
                self._connections.pop(sock, None)
            sock.close()

    def _serve(self, sock: socket.socket, seal: Seal, held: set[int]) -> None:
        waiting: deque[Offsets] = deque()
        while True:
            # With a slot in hand it is decode that must go on, and may be about to free it: that is read first. Without
            # one, other connections must.
            patience_s = 0 if held else 2 * self._patience_s  # longer than a frozen reader keeps its slot
            slot = self._stage.slots.take(patience_s, lambda: self._closed) if waiting else None
            if slot is not None:
                held.add(slot)
                self._stage.gather(waiting.popleft(), slot)
                sock.sendall(encode(seal.sign({"type": "staged", "slot": slot}), _MAX_HEADER))
            elif waiting and not held:
                raise ReadFailed(f"no staging slot became free in {patience_s:.0f} s")
            else:
                if not held:
                    _await(sock)
                self._take(sock, seal, waiting, held)

    def _take(self, sock: socket.socket, seal: Seal, waiting: deque[Offsets], held: set[int]) -> None:
        message = seal.check(receive_frame(sock, _MAX_HEADER))
        match message["type"]:
            case "free":
                slot = _whole(message, "slot", 0, self._stage.region.nbytes // self._stage.slot_bytes - 1)
                if slot not in held:
                    raise ProtocolError(f"a decode worker freed staging slot {slot}, which it does not hold")
                held.remove(slot)
                self._stage.slots.give(slot)
            case "stage":
                if len(waiting) + len(held) >= _ASKED_AHEAD:
                    raise ProtocolError("a decode worker asked for too many blocks at a time")
                number = _whole(message, "blocks", 1, self._stage.slot_bytes // self._stage.block_bytes)
                body = receive(sock, number * 8)
                if hashlib.sha256(body).hexdigest() != message.get("digest"):
                    raise AuthenticationFailed("a request for blocks was altered on its way")
                blocks = np.frombuffer(body, "<i8").astype(np.int64)
                if blocks.min() < 0 or blocks.max() >= self._stage.num_blocks:
                    raise ProtocolError(f"a request for blocks leaves the pool of {self._stage.num_blocks}")
                waiting.append(blocks)
            case other:
                raise ProtocolError(f"a decode worker sent {other!r:.40}, wanted 'stage' or 'free'")

    def close(self) -> None:
        """End all connections. Afterwards nothing is gathered, and the carriers serve nobody."""
        with self._lock:
            self._closed = True
            connections = dict(self._connections)
        self._stage.slots.wake()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in (self._thread, *connections.values()):
            thread.join()
        self._carriers.close()
        self._stage.close()


def _await(sock: socket.socket) -> None:
    """Until something can be read: an idle connection may be silent for as long as it likes."""
    while True:
        try:
            sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            continue
        return


class _Round(NamedTuple):
    """Blocks that go through one slot: their places in the request, and our slot."""

    places: slice
    slot: int


class StagedPeer(BlockPeer):
    """The way to one exporter. `stage` is shared by all peers of this worker, and closed by its owner.

    `carriers` connect a host path to the exporter's staging memory, with our own as the target, best first.
    """

    name = "staged"

    def __init__(
        self,
        metadata: bytes,
        stage: Stage,
        identity: Identity,
        carriers: Mapping[str, Callable[[bytes], PathPeer]],
        patience_s: float = 20.0,
    ) -> None:
        values = read_metadata(metadata, "staged", **_FIELDS)
        where = (values["host"], values["port"])
        self._num_blocks, self._their_slot = values["blocks"], values["slot_bytes"]
        self._their_slots = values["nbytes"] // self._their_slot
        try:
            offers = {name: b64decode(blob, validate=True) for name, blob in values["carriers"].items()}
        except ValueError as error:
            raise ReadFailed(f"the peer's staged metadata cannot be read: {error}") from error
        self._stage, self.block_bytes = stage, stage.block_bytes
        self._patience_s = patience_s
        self._aborted = threading.Event()
        self._sock: socket.socket | None = None
        self._carrier = _carry(offers, carriers)
        self.carrier = self._carrier.name
        try:
            self._sock = socket.create_connection(where, HANDSHAKE_S)
            self._sock.settimeout(None)
            tune(self._sock, HANDSHAKE_S)
            self._seal = connect(self._sock, identity)
            tune(self._sock, patience_s)
        except (*_ENDED, UnicodeError) as error:  # UnicodeError: not the name of a host
            self.close()
            raise ReadFailed(
                f"no staging connection to {where[0]}:{where[1]}: {error}; is the port open between the hosts, and is "
                "the cluster key the same?"
            ) from error
        except TransferError:
            self.close()
            raise

    def read_blocks(self, sources: Offsets, targets: Offsets, *, checksum: bool = True) -> Hashes | None:
        """See the base class. A read that fails ends this peer: nothing that is on its way can land."""
        if self._aborted.is_set() or self._sock is None:
            raise ReadFailed("this staged peer is closed")
        if len(sources) != len(targets):
            raise LayoutMismatch(f"{len(sources)} source blocks for {len(targets)} target blocks, wanted equal numbers")
        if len(sources) and (sources.min() < 0 or sources.max() >= self._num_blocks):
            raise LayoutMismatch(f"a block is outside the peer's pool of {self._num_blocks}")
        hashes = np.zeros(len(sources), np.uint64)
        ours: set[int] = set()
        try:
            self._rounds(sources, targets, hashes, ours)
        except BaseException as error:
            self.close()
            self._stage.finish()
            if self._aborted.is_set():
                raise aborted() from error
            if isinstance(error, _ENDED):
                silent = isinstance(error, BlockingIOError)
                why = f"the peer was silent for {self._patience_s:.0f} s" if silent else str(error)
                raise ReadFailed(f"the staged read was cut off: {why}") from error
            raise
        finally:
            # The carrier keeps the law too: it writes no slot any more.
            for slot in ours:
                self._stage.slots.give(slot)
        return hashes if checksum else None

    def _rounds(self, sources: Offsets, targets: Offsets, hashes: Hashes, ours: set[int]) -> None:
        step = min(self._their_slot, self._stage.slot_bytes) // self.block_bytes
        asked: deque[_Round] = deque()
        landing: deque[tuple[_Round, Callable[[], Hashes]]] = deque()

        def land() -> None:
            one, wait = landing.popleft()
            hashes[one.places] = wait()
            ours.remove(one.slot)
            self._stage.slots.give(one.slot)

        def bring() -> None:
            one = asked.popleft()
            landing.append((one, self._bring(one, targets)))

        for begin in range(0, len(sources), step):
            # What we have ourselves is used up before others are waited for: else two reads could wait for each other.
            while (slot := self._slot(wait=not asked and not landing)) is None:
                if landing:
                    land()
                else:
                    bring()
            ours.add(slot)
            asked.append(_Round(slice(begin, min(begin + step, len(sources))), slot))
            self._ask(sources[asked[-1].places])
            if len(asked) == _ASKED_AHEAD:
                bring()
        while asked:
            bring()
        while landing:
            land()

    def _slot(self, *, wait: bool) -> int | None:
        slot = self._stage.slots.take(self._patience_s if wait else 0, self._aborted.is_set)
        if slot is None and wait:
            raise ReadFailed(f"no staging slot of this worker became free in {self._patience_s:.0f} s")
        return slot

    def _send(self, message: Message, body: bytes = b"") -> None:
        if self._sock is None:
            raise EOFError("the connection was closed")
        self._sock.sendall(encode(self._seal.sign(message), _MAX_HEADER) + body)

    def _ask(self, blocks: Offsets) -> None:
        if self._aborted.is_set():
            raise aborted()
        body = blocks.astype("<i8").tobytes()
        self._send({"type": "stage", "blocks": len(blocks), "digest": hashlib.sha256(body).hexdigest()}, body)

    def _bring(self, one: _Round, targets: Offsets) -> Callable[[], Hashes]:
        if self._sock is None:
            raise EOFError("the connection was closed")
        message = self._seal.check(receive_frame(self._sock, _MAX_HEADER))
        if message["type"] != "staged":
            raise ProtocolError(f"the peer sent {message['type']!r:.40}, wanted 'staged'")
        theirs = _whole(message, "slot", 0, self._their_slots - 1)
        nbytes = (one.places.stop - one.places.start) * self.block_bytes
        start = (theirs * self._their_slot, one.slot * self._stage.slot_bytes)
        # Not hashed on the way: the GPU does that when it spreads the blocks, end to end.
        self._carrier.read(Plan(*(np.array([value]) for value in (*start, nbytes))), checksum=False)
        self._send({"type": "free", "slot": theirs})
        return self._stage.scatter(one.slot, targets[one.places])

    def abort(self) -> None:
        """See the base class."""
        self._aborted.set()
        self._stage.slots.wake()
        self._carrier.abort()
        if (sock := self._sock) is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See the base class."""
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()
        self._carrier.close()


def _carry(offers: Mapping[str, bytes], carriers: Mapping[str, Callable[[bytes], PathPeer]]) -> PathPeer:
    refusals = []
    for name, make in carriers.items():
        if name in offers:
            try:
                return make(offers[name])
            except TransferError as error:
                refusals.append(f"{name}: {error}")
    raise ReadFailed(
        f"no host path reaches the peer's staging memory: {'; '.join(refusals) or 'it offers none of ours'}"
    )
