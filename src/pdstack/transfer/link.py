"""Decode's link to one prefill agent: the control connection, the ways to read, and the one thread that reads."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

from pdstack.transfer.backends import Peer
from pdstack.transfer.channel import MISSED_HEARTBEATS, Channel
from pdstack.transfer.errors import (
    LayoutMismatch,
    PeerUnreachable,
    ProtocolError,
    Refused,
    TransferError,
)
from pdstack.transfer.incoming import Incoming
from pdstack.transfer.paths import BACKEND, Importers, Routes, read_offers
from pdstack.transfer.ticket import Ticket
from pdstack.transfer.transport import Transport
from pdstack.transfer.wire import Message

# How long prefill may take to describe itself, or to answer a begin.
_ANSWER_S = 5.0


@dataclass(frozen=True)
class Expected:
    """What a prefill agent has to be like for this decode agent."""

    backend: str
    layout: str
    block_bytes: int
    hashing: str

    def check(self, message: Message, who: str) -> None:
        """Raise :class:`LayoutMismatch` unless prefill's description fits."""
        if message.get("backend") != self.backend:
            raise LayoutMismatch(
                f"{who} moves KV over {message.get('backend')!r:.40}, this worker over {self.backend!r}: "
                "kv_transfer_backend must be the same on all workers",
                code="backend",
            )
        if message.get("layout") != self.layout or message.get("block_bytes") != self.block_bytes:
            raise LayoutMismatch(
                f"{who} has KV layout {str(message.get('layout'))[:16]!r} with blocks of "
                f"{message.get('block_bytes')!r:.20} bytes, this worker has {self.layout[:16]!r} with "
                f"{self.block_bytes}: model, dtype or block size differ"
            )
        if message.get("hashing") != self.hashing:
            raise LayoutMismatch(
                f"{who} hashes blocks with {message.get('hashing')!r:.40}, this worker with {self.hashing!r}: pools in "
                "host memory and in GPU memory cannot be mixed",
                code="hashing",
            )


class Link:
    """One prefill agent."""

    def __init__(self, channel: Channel, where: tuple[str, int], heartbeat_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.channel, self.where = channel, where
        self.name = channel.peer.name
        self.incarnation = channel.peer.incarnation
        self.num_blocks = 0
        self.reads: set[asyncio.Future[Any]] = set()
        self.lost: asyncio.Future[TransferError] = loop.create_future()
        self.executor = ThreadPoolExecutor(1, thread_name_prefix=f"kv-read-{self.name}")
        self.transports: set[Transport] = set()
        self._routes: Routes | None = None
        self._heartbeat_s = heartbeat_s
        self._silence_s = heartbeat_s * MISSED_HEARTBEATS
        self._ids = count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._incoming: dict[str, Incoming] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def routes(self) -> Routes:
        """The ways to read; there are some once the link is open."""
        if self._routes is None:
            raise RuntimeError("the link is not open")
        return self._routes

    async def open(self, importers: Importers, expected: Expected) -> None:
        """Take prefill's description and connect the best way to read. Raises a :class:`TransferError`."""
        message = await self.channel.receive(_ANSWER_S)
        if message["type"] != "describe":
            raise ProtocolError(f"{self.name} sent {message['type']!r:.40}, wanted 'describe'")
        expected.check(message, self.name)
        number = message.get("num_blocks")
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ProtocolError(f"{self.name} has {number!r:.40} blocks, wanted a whole number")
        self.num_blocks = number
        try:
            metadata = b64decode(message["metadata"], validate=True)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"{self.name}'s description cannot be read: {error}") from None
        offers = {BACKEND: metadata, **read_offers(message.get("paths"), self.name)}
        loop = asyncio.get_running_loop()
        self._routes = await loop.run_in_executor(self.executor, importers.connect, offers, self.name)
        self._tasks = [loop.create_task(self._receive()), loop.create_task(self._beat())]

    async def begin(self, incoming: Incoming) -> None:
        """Ask prefill's leave to read, or to go on; its frames go to `incoming` until :meth:`end`.

        Raises :class:`Refused`, or :class:`PeerUnreachable` if the link is lost or silent.
        """
        wire = incoming.ticket.to_wire()
        self._incoming[incoming.ticket.nonce] = incoming
        try:
            answer = await self._ask({"type": "begin", "ticket": wire, "from": len(incoming.hashes)})
        except BaseException:
            self.end(incoming)
            if not self.lost.done():
                # Prefill may have granted it meanwhile; without this the export would be held until the link ends. Over
                # a lost link nothing is said: what was granted over it may still be had over the next.
                self.channel.send({"type": "discard", "ticket": wire})
            raise
        if answer["type"] != "granted":
            self.end(incoming)
            # Codes become labels of metrics, which take no more than these characters.
            code = f"{answer.get('code')!s:.40}"
            known = code.isascii() and code.replace("_", "a").isalnum()
            reason = f"{self.name} refused: {answer.get('reason')!r:.300}"
            raise Refused(reason, code=code if known else "refused")

    def end(self, incoming: Incoming) -> None:
        """What prefill still says about it is not wanted any more."""
        self._incoming.pop(incoming.ticket.nonce, None)

    def acknowledge(self, incoming: Incoming) -> None:
        """Tell prefill how far we are, so that it announces more."""
        self.channel.send({"type": "ack", "nonce": incoming.ticket.nonce, "count": incoming.verified})

    def done(self, ticket: Ticket, ok: bool) -> None:
        """Tell prefill that the read has ended: its blocks may be reused."""
        self.channel.send({"type": "done", "nonce": ticket.nonce, "ok": ok})

    async def _ask(self, message: Message) -> Message:
        number = next(self._ids)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self.channel.send({**message, "id": number})
            ends: list[asyncio.Future[Any]] = [answer, self.lost]
            await asyncio.wait(ends, timeout=_ANSWER_S, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if self.lost.done():
                raise PeerUnreachable(f"{self.name} was lost: {self.lost.result()}")
            raise PeerUnreachable(f"{self.name} did not answer within {_ANSWER_S:.0f} s")
        finally:
            del self._waiting[number]

    async def _receive(self) -> None:
        try:
            while True:
                self._take(await self.channel.receive(self._silence_s))
        except TransferError as error:
            self.fail(error)

    def _take(self, message: Message) -> None:
        match message["type"]:
            case "pong":
                pass
            case "granted" | "refused":
                number = message.get("id")
                answer = self._waiting.get(number) if isinstance(number, int) else None
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case "ready" | "computed" | "failed":
                # Frames of a fetch that has ended meanwhile may still come.
                if (incoming := self._incoming.get(str(message.get("nonce")))) is not None:
                    incoming.take(message, self.name)
            case other:
                raise ProtocolError(f"{self.name} sent {other!r:.40}, which decode does not know")

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while not self.lost.done():
            self.channel.send({"type": "ping"})
            if not self.reads:
                await loop.run_in_executor(self.executor, self.routes.tend)
            await asyncio.wait([self.lost], timeout=self._heartbeat_s)

    def fail(self, error: TransferError) -> None:
        """Give the peer up: no new read starts, those that run are cut off, and then everything lets go of it."""
        if self.lost.done():
            return
        self.lost.set_result(error)
        if self._routes is not None:
            self._routes.abort()
            self.executor.submit(self._routes.close)
        self.executor.shutdown(wait=False)

    async def close(self) -> list[Peer]:
        """Close and wait until everything has let go. Returns the connections that are parked instead."""
        self.fail(PeerUnreachable("the agent was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.channel.close()
        await asyncio.to_thread(self.executor.shutdown)
        return self._routes.take_parked() if self._routes is not None else []
