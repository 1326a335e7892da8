"""Decode's link to one prefill agent: the control connection, the ways to read, and the one thread that reads."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
from pdstack.transfer.landing import Landing
from pdstack.transfer.layout import KVLayout
from pdstack.transfer.paths import BACKEND, Routes, read_offers
from pdstack.transfer.ticket import Ticket
from pdstack.transfer.transport import Transport
from pdstack.transfer.wire import Message

# How long prefill may take to describe itself, or to answer a begin.
_ANSWER_S = 5.0
# Blocks, or tokens in one: beyond this a number is no size.
_MOST = 1 << 31


@dataclass(frozen=True)
class Expected:
    """What a prefill agent has to be like for this decode agent."""

    backend: str
    layout: KVLayout
    hashing: str

    def check(self, message: Message, who: str) -> KVLayout:
        """Prefill's layout: this worker's own, but for the number of blocks and, it may be, the tokens in one.

        Raises :class:`LayoutMismatch` unless prefill's description fits, :class:`ProtocolError` if it is none.
        """
        if message.get("backend") != self.backend:
            raise LayoutMismatch(
                f"{who} moves KV over {message.get('backend')!r:.40}, this worker over {self.backend!r}: "
                "kv_transfer_backend must be the same on all workers",
                code="backend",
            )
        counts: dict[str, Any] = {}
        for field in ("num_blocks", "block_size"):
            number = message.get(field)
            if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < _MOST:
                raise ProtocolError(f"{who} has {number!r:.40} as its {field}, wanted a whole number")
            counts[field] = number
        theirs = replace(self.layout, **counts)
        if message.get("layout") != theirs.fingerprint():
            raise LayoutMismatch(
                f"{who} has KV layout {str(message.get('layout'))[:16]!r} with blocks of {theirs.block_size} tokens, "
                f"this worker has {self.layout.fingerprint()[:16]!r} with {self.layout.block_size}: model, dtype or "
                "engine differ"
            )
        if message.get("hashing") != self.hashing:
            raise LayoutMismatch(
                f"{who} hashes blocks with {message.get('hashing')!r:.40}, this worker with {self.hashing!r}: pools in "
                "host memory and in GPU memory cannot be mixed",
                code="hashing",
            )
        return theirs


class Link:
    """One prefill agent."""

    def __init__(self, channel: Channel, where: tuple[str, int], heartbeat_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.channel, self.where = channel, where
        self.name = channel.peer.name
        self.incarnation = channel.peer.incarnation
        self.reads: set[asyncio.Future[Any]] = set()
        self.lost: asyncio.Future[TransferError] = loop.create_future()
        self.executor = ThreadPoolExecutor(1, thread_name_prefix=f"kv-read-{self.name}")
        self.transports: set[Transport] = set()
        self._routes: Routes | None = None
        self._landing: Landing | None = None
        self._layout: KVLayout | None = None
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

    @property
    def landing(self) -> Landing:
        """Where blocks are read into; there is one once the link is open."""
        if self._landing is None:
            raise RuntimeError("the link is not open")
        return self._landing

    @property
    def layout(self) -> KVLayout:
        """Prefill's layout, once the link is open."""
        if self._layout is None:
            raise RuntimeError("the link is not open")
        return self._layout

    async def open(self, land: Callable[[KVLayout], Landing], expected: Expected) -> None:
        """Take prefill's description and connect the best way to read. Raises a :class:`TransferError`.

        `land` gives the place for blocks of prefill's layout; it is called in the link's thread.
        """
        message = await self.channel.receive(_ANSWER_S)
        if message["type"] != "describe":
            raise ProtocolError(f"{self.name} sent {message['type']!r:.40}, wanted 'describe'")
        self._layout = theirs = expected.check(message, self.name)
        try:
            metadata = b64decode(message["metadata"], validate=True)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"{self.name}'s description cannot be read: {error}") from None
        offers = {BACKEND: metadata, **read_offers(message.get("paths"), self.name)}
        loop = asyncio.get_running_loop()
        self._landing = await loop.run_in_executor(self.executor, land, theirs)
        self._routes = await loop.run_in_executor(self.executor, self._landing.importers.connect, offers, self.name)
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
        parked = self._routes.take_parked() if self._routes is not None else []
        if self._landing is not None and not parked:
            await asyncio.to_thread(self._landing.close)
        return parked
