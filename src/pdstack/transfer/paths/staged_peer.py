"""Decode's end of the path `staged`, whose protocol :mod:`staged` tells."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from pdstack.transfer.channel import HANDSHAKE_S, Identity
from pdstack.transfer.errors import LayoutMismatch, ProtocolError, ReadFailed, TransferError
from pdstack.transfer.metadata import NBYTES, Kind, Text, Texts, Whole, read_metadata
from pdstack.transfer.paths.base import PathPeer, Region, aborted
from pdstack.transfer.paths.blocks import BlockPeer
from pdstack.transfer.paths.shared import SharedPeer
from pdstack.transfer.paths.sockets import connect, receive_frame, tune
from pdstack.transfer.paths.stage import Stage
from pdstack.transfer.paths.staged import ASKED_AHEAD, MAX_HEADER, whole
from pdstack.transfer.plan import Offsets, Plan
from pdstack.transfer.store import Hashes
from pdstack.transfer.wire import Message, encode

_ENDED = (OSError, EOFError)
_FIELDS: dict[str, Kind] = {
    "host": Text(255),
    "port": Whole(1, 65535),
    "blocks": NBYTES,
    "slot_bytes": NBYTES,
    "nbytes": NBYTES,
    "carriers": Texts(8192),
}


class _Round(NamedTuple):
    """Blocks that go through one slot: their places in the request, and our slot; None if we need none."""

    places: slice
    slot: int | None


class _Landing(NamedTuple):
    """A round whose blocks are being scattered, and the slot of theirs that is still read."""

    round: _Round
    wait: Callable[[], Hashes]
    theirs: int | None


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
        if self._their_slot < stage.block_bytes:
            raise ReadFailed(f"the peer's slots of {self._their_slot} bytes hold no block of {stage.block_bytes}")
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
        # Where we can, prefill's slots are read in place: the base of them, and what ends that.
        self._mapped: Region | None = None
        self._disown: Callable[[], None] | None = None
        if isinstance(self._carrier, SharedPeer):
            self._disown = stage.adopt(self._carrier.mapped)
            self._mapped = self._carrier.mapped if self._disown is not None else None
            if self._carrier.mapped.nbytes < self._their_slots * self._their_slot:
                self.close()
                raise ReadFailed("the peer's staging memory is smaller than it said")
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

    @property
    def in_place(self) -> bool:
        """Whether blocks are scattered right from prefill's slots."""
        return self._mapped is not None

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
            self._stage.finish()
            self.close()
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
        landing: deque[_Landing] = deque()

        def land() -> None:
            one, wait, theirs = landing.popleft()
            hashes[one.places] = wait()
            if theirs is not None:
                self._send({"type": "free", "slot": theirs})
            if one.slot is not None:
                ours.remove(one.slot)
                self._stage.slots.give(one.slot)

        def bring() -> None:
            # No slot of theirs is kept while we wait for another, or two decode workers could wait for each other.
            while landing and landing[0].theirs is not None:
                land()
            landing.append(self._bring(asked.popleft(), targets))

        for begin in range(0, len(sources), step):
            slot: int | None = None
            # What we have ourselves is used up before others are waited for: else two reads could wait for each other.
            while self._mapped is None and (slot := self._slot(wait=not asked and not landing)) is None:
                if landing:
                    land()
                else:
                    bring()
            if slot is not None:
                ours.add(slot)
            asked.append(_Round(slice(begin, min(begin + step, len(sources))), slot))
            self._ask(sources[asked[-1].places])
            if len(asked) == ASKED_AHEAD:
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
        self._sock.sendall(encode(self._seal.sign(message), MAX_HEADER) + body)

    def _ask(self, blocks: Offsets) -> None:
        if self._aborted.is_set():
            raise aborted()
        body = blocks.astype("<i8").tobytes()
        self._send({"type": "stage", "blocks": len(blocks), "digest": hashlib.sha256(body).hexdigest()}, body)

    def _bring(self, one: _Round, targets: Offsets) -> _Landing:
        if self._sock is None:
            raise EOFError("the connection was closed")
        message = self._seal.check(receive_frame(self._sock, MAX_HEADER))
        if message["type"] != "staged":
            raise ProtocolError(f"the peer sent {message['type']!r:.40}, wanted 'staged'")
        theirs = whole(message, "slot", 0, self._their_slots - 1)
        blocks = targets[one.places]
        if self._mapped is not None:
            return _Landing(one, self._stage.scatter(self._mapped.address + theirs * self._their_slot, blocks), theirs)
        assert one.slot is not None
        nbytes = len(blocks) * self.block_bytes
        start = (theirs * self._their_slot, one.slot * self._stage.slot_bytes)
        # Not hashed on the way: the GPU does that when it spreads the blocks, end to end.
        self._carrier.read(Plan(*(np.array([value]) for value in (*start, nbytes))), checksum=False)
        self._send({"type": "free", "slot": theirs})
        return _Landing(one, self._stage.scatter(self._stage.address(one.slot), blocks), None)

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
        disown, self._disown = self._disown, None
        if disown is not None:
            disown()
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
