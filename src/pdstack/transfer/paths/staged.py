"""Path `staged`: between GPU pools that cannot map each other, through host memory of both ends, one run at a time.

Prefill gathers the blocks that decode asks for into a slot of its staging memory; decode brings the slot over as one
extent by a path of host memory, the *carrier* (shared or cma on one host, stream to another), and scatters it into its
own pool, with the blocks' hashes in the same pass. If the carrier is shared, and the GPU can read what is mapped here
read-only, it scatters right from prefill's slot. Slots are few: staging memory does not grow with peers or prompts.
The requests have a connection of their own, with the handshake of the control channel::

    decode  -> frame {"type": "stage", "blocks": n, "digest"}   n block numbers, little-endian int64
    prefill -> frame {"type": "staged", "slot": k}              the blocks are in slot k, one behind the other
    decode  -> frame {"type": "free", "slot": k}

Two requests are on the way at a time. A decode that holds a slot and says nothing for the time of patience loses the
connection, and so the slot. It would then read another's blocks from it: their hashes are not the ones it waits for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
from collections import deque
from typing import Protocol

import numpy as np

from pdstack.transfer.backends.base import Exporter
from pdstack.transfer.channel import HANDSHAKE_S, Identity
from pdstack.transfer.errors import AuthenticationFailed, ProtocolError, ReadFailed, TransferError
from pdstack.transfer.paths.sockets import Server, accept, receive, receive_frame, tune
from pdstack.transfer.paths.stage import Stage
from pdstack.transfer.plan import Offsets
from pdstack.transfer.wire import Message, Seal, encode

_log = logging.getLogger(__name__)
ASKED_AHEAD = 2
MAX_HEADER = 4096
_MAX_CONNECTIONS = 64
_ENDED = (OSError, EOFError)


class Carriers(Protocol):
    """The exporters of a stage's memory (`offers.Offers`)."""

    def wire(self) -> dict[str, str]:
        """Each path's metadata in base64."""

    def close(self) -> None:
        """End them."""


def whole(message: Message, field: str, low: int, high: int) -> int:
    """A whole number of a message. Raises :class:`ProtocolError`."""
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
        self._server = Server("kv-staged", host, port, _MAX_CONNECTIONS, self._converse)
        values = {"host": advertise, "port": self._server.port, "blocks": stage.num_blocks}
        values |= {"slot_bytes": stage.slot_bytes, "nbytes": stage.region.nbytes, "carriers": carriers.wire()}
        self._metadata = json.dumps(values).encode()

    def metadata(self) -> bytes:
        """Where to ask, the pool's blocks, the staging memory, and the metadata of each carrier, as JSON."""
        return self._metadata

    def tend(self) -> None:
        """Nothing to do."""

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

    def _serve(self, sock: socket.socket, seal: Seal, held: set[int]) -> None:
        waiting: deque[Offsets] = deque()
        while True:
            # With a slot in hand it is decode that must go on, and may be about to free it: that is read first. Without
            # one, other connections must.
            patience_s = 0 if held else 2 * self._patience_s  # longer than a frozen reader keeps its slot
            slot = self._stage.slots.take(patience_s, lambda: self._server.closed) if waiting else None
            if slot is not None:
                held.add(slot)
                self._stage.gather(waiting.popleft(), slot)
                sock.sendall(encode(seal.sign({"type": "staged", "slot": slot}), MAX_HEADER))
            elif waiting and not held:
                raise ReadFailed(f"no staging slot became free in {patience_s:.0f} s")
            else:
                if not held:
                    _await(sock)
                self._take(sock, seal, waiting, held)

    def _take(self, sock: socket.socket, seal: Seal, waiting: deque[Offsets], held: set[int]) -> None:
        message = seal.check(receive_frame(sock, MAX_HEADER))
        match message["type"]:
            case "free":
                slot = whole(message, "slot", 0, self._stage.region.nbytes // self._stage.slot_bytes - 1)
                if slot not in held:
                    raise ProtocolError(f"a decode worker freed staging slot {slot}, which it does not hold")
                held.remove(slot)
                self._stage.slots.give(slot)
            case "stage":
                if len(waiting) + len(held) >= 2 * ASKED_AHEAD:
                    raise ProtocolError("a decode worker asked for too many blocks at a time")
                number = whole(message, "blocks", 1, self._stage.slot_bytes // self._stage.block_bytes)
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
        self._server.close(self._stage.slots.wake)
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
