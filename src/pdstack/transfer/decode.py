"""The decode agent: takes a ticket, asks prefill's leave, reads, verifies, and says that it is done."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from base64 import b64decode
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, NamedTuple

from pdstack.transfer.agent import TransferAgent, TransferReport
from pdstack.transfer.backends import Importer, Peer, open_importer
from pdstack.transfer.channel import MISSED_HEARTBEATS, Channel, connect
from pdstack.transfer.checksum import checksum_blocks
from pdstack.transfer.errors import (
    ChecksumMismatch,
    LayoutMismatch,
    PeerUnreachable,
    ProtocolError,
    ReadFailed,
    ReadTimeout,
    Refused,
    TicketError,
    TransferError,
)
from pdstack.transfer.layout import Run, check_blocks, plan_runs
from pdstack.transfer.paths import BACKEND, PathImporter, read_offers
from pdstack.transfer.roles import Role
from pdstack.transfer.ticket import Ticket, verify
from pdstack.transfer.transport import Transport
from pdstack.transfer.wire import Message

_log = logging.getLogger(__name__)
# A parked peer is closed when a later read from the same place succeeds, but not before it had this time to see that
# its answer goes nowhere; and no more than so many are kept.
_PARKED_S = 2.0
_MAX_PARKED = 16
# How long prefill may take to answer a begin.
_ANSWER_S = 5.0


class _Outcome(NamedTuple):
    read_seconds: float
    checksum_seconds: float
    checksum: str
    transport: Transport


class _Parked(NamedTuple):
    peer: Peer
    where: tuple[str, int]
    incarnation: str
    since: float


class _Link:
    """One prefill agent: its control channel, its backend peer, and the one thread that touches the peer."""

    def __init__(self, channel: Channel, where: tuple[str, int], heartbeat_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.channel, self.where = channel, where
        self.name = channel.peer.name
        self.num_blocks = 0
        self.reads: set[asyncio.Future[_Outcome]] = set()
        self.lost: asyncio.Future[TransferError] = loop.create_future()
        self.executor = ThreadPoolExecutor(1, thread_name_prefix=f"kv-read-{self.name}")
        self.peer: Peer | None = None
        self.transports: set[Transport] = set()
        self._heartbeat_s = heartbeat_s
        self._silence_s = heartbeat_s * MISSED_HEARTBEATS
        self._ids = count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, importer: Importer | PathImporter, backend: str, layout: str, block_bytes: int) -> None:
        """Take prefill's description and connect the backend, or a path. Raises a :class:`TransferError`."""
        message = await self.channel.receive(_ANSWER_S)
        if message["type"] != "describe":
            raise ProtocolError(f"{self.name} sent {message['type']!r:.40}, wanted 'describe'")
        if message.get("backend") != backend:
            raise LayoutMismatch(
                f"{self.name} moves KV over {message.get('backend')!r:.40}, this worker over {backend!r}: "
                "kv_transfer_backend must be the same on all workers",
                code="backend",
            )
        if message.get("layout") != layout or message.get("block_bytes") != block_bytes:
            raise LayoutMismatch(
                f"{self.name} has KV layout {str(message.get('layout'))[:16]!r} with blocks of "
                f"{message.get('block_bytes')!r:.20} bytes, this worker has {layout[:16]!r} with {block_bytes}: "
                "model, dtype or block size differ"
            )
        try:
            self.num_blocks = int(message["num_blocks"])
            metadata = b64decode(message["metadata"], validate=True)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"{self.name}'s description cannot be read: {error}") from None
        loop = asyncio.get_running_loop()
        if isinstance(importer, PathImporter):
            offers = read_offers(message.get("paths"), self.name)
            self.peer = await loop.run_in_executor(self.executor, importer.connect, offers, self.name)
        else:
            self.peer = await loop.run_in_executor(self.executor, importer.connect, metadata)
        self._tasks = [loop.create_task(self._receive()), loop.create_task(self._beat())]

    async def ask(self, message: Message, timeout_s: float) -> Message:
        """Send a message and wait for its answer. Raises :class:`PeerUnreachable` if the link is lost or silent."""
        number = next(self._ids)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self.channel.send({**message, "id": number})
            ends: list[asyncio.Future[Any]] = [answer, self.lost]
            await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if self.lost.done():
                raise PeerUnreachable(f"{self.name} was lost: {self.lost.result()}")
            raise PeerUnreachable(f"{self.name} did not answer within {timeout_s:.0f} s")
        finally:
            del self._waiting[number]

    async def _receive(self) -> None:
        try:
            while True:
                message = await self.channel.receive(self._silence_s)
                if message["type"] in ("granted", "refused"):
                    answer = self._waiting.get(message.get("id", 0))
                    if answer is not None and not answer.done():
                        answer.set_result(message)
                elif message["type"] != "pong":
                    raise ProtocolError(f"{self.name} sent {message['type']!r:.40}, which decode does not know")
        except TransferError as error:
            self.fail(error)

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while not self.lost.done():
            self.channel.send({"type": "ping"})
            if self.peer is not None and not self.reads:
                await loop.run_in_executor(self.executor, self.peer.tend)
            await asyncio.wait([self.lost], timeout=self._heartbeat_s)

    def fail(self, error: TransferError) -> None:
        """Give the peer up: no new read starts, those that run are cut off, and then the backend lets go of it."""
        if self.lost.done():
            return
        self.lost.set_result(error)
        if self.peer is not None:
            self.peer.abort()
            self.executor.submit(self._let_go, self.peer)
        self.executor.shutdown(wait=False)

    @staticmethod
    def _let_go(peer: Peer) -> None:
        if not peer.parked:
            peer.close()

    async def close(self) -> None:
        """Close and wait until the backend has let go, or parked the peer."""
        self.fail(PeerUnreachable("the agent was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.channel.close()
        await asyncio.to_thread(self.executor.shutdown)


class DecodeAgent(TransferAgent):
    """Imports KV. Created by :meth:`TransferAgent.create`."""

    role = Role.DECODE
    _importer: Importer | PathImporter

    async def start(self) -> None:
        """See :class:`TransferAgent`."""
        self._links: dict[tuple[str, int], _Link] = {}
        self._locks: dict[tuple[str, int], asyncio.Lock] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._parked: list[_Parked] = []
        self._bytes = self._transfers = self._failures = self._quarantined = 0
        config = self.config
        if config.path == BACKEND:
            self._carrier = config.backend
            self._importer = await asyncio.to_thread(open_importer, config.backend, self.name, self._view)
        else:
            self._carrier = "path"
            self._importer = PathImporter(config.path, self._view, self._identity, config.read_timeout_s)
        over = config.backend if config.path == BACKEND else f"path {config.path}"
        _log.info("decode agent %s imports KV over %s", self.name, over)

    async def fetch(self, ticket: Ticket, local_blocks: Sequence[int]) -> TransferReport:
        """See :class:`TransferAgent`."""
        started = time.perf_counter()
        try:
            check_blocks(local_blocks, self.layout.num_blocks, "local")
            self._check(ticket)
            runs = plan_runs(ticket.blocks, local_blocks)
            link = await self._link(ticket)
            check_blocks(ticket.blocks, link.num_blocks, f"{ticket.worker}'s")
            await self._begin(link, ticket)
            outcome = await self._read(link, ticket, runs, tuple(local_blocks))
        except TransferError as error:
            self._failures += 1
            # What a forged ticket says must not become a label.
            worker = "?" if error.code == "forged" else ticket.worker
            self.metrics.failures.labels(self._carrier, worker, error.code).inc()
            _log.warning(
                "fetch of request %s from %s failed (%s): %s", ticket.request_id, ticket.worker, error.code, error
            )
            raise
        report = self._report(link, runs, outcome, time.perf_counter() - started)
        if self._parked:
            await self._unpark(link)
        return report

    async def _unpark(self, healthy: _Link) -> None:
        """Close parked peers of the worker that has just served a read, and those of its earlier runs."""
        latest = time.monotonic() - _PARKED_S
        for parked in list(self._parked):
            known = parked.incarnation == healthy.channel.peer.incarnation
            if parked.where == healthy.where and (not known or parked.since <= latest):
                await self._bury(parked)

    async def _bury(self, parked: _Parked) -> None:
        if parked not in self._parked:
            return  # another fetch is closing it
        self._parked.remove(parked)
        await asyncio.to_thread(parked.peer.close)

    async def discard(self, ticket: Ticket) -> None:
        """See :class:`TransferAgent`."""
        try:
            self._check(ticket)
            link = await self._link(ticket)
            link.channel.send({"type": "discard", "ticket": ticket.to_wire()})
        except TransferError as error:
            _log.info("could not discard the export of request %s: %s", ticket.request_id, error)

    def _check(self, ticket: Ticket) -> None:
        verify(ticket, self.config.cluster_key, audience=self._identity.audience, layout=self._fingerprint)
        if ticket.backend != self.config.backend:
            raise TicketError(
                f"ticket of request {ticket.request_id!r} is for backend {ticket.backend!r}, this worker uses "
                f"{self.config.backend!r}: kv_transfer_backend must be the same on all workers",
                code="backend",
            )

    async def _link(self, ticket: Ticket) -> _Link:
        where = (ticket.host, ticket.port)
        async with self._locks.setdefault(where, asyncio.Lock()):
            link = self._links.get(where)
            if link is not None and link.lost.done():
                del self._links[where]
                link = None
            if link is None:
                link = await self._connect(where)
        peer = link.channel.peer
        if (peer.name, peer.incarnation) != (ticket.worker, ticket.incarnation):
            raise TicketError(
                f"ticket of request {ticket.request_id!r} was issued by another run of {ticket.worker!r} than the one "
                f"at {ticket.host}:{ticket.port} ({peer.name!r})",
                code="incarnation",
            )
        return link

    async def _connect(self, where: tuple[str, int]) -> _Link:
        started = time.perf_counter()
        channel = await connect(*where, self._identity)
        link = _Link(channel, where, self.config.heartbeat_s)
        try:
            await link.open(self._importer, self.config.backend, self._fingerprint, self.layout.block_bytes)
        except BaseException:
            await link.close()
            raise
        self._links[where] = link
        self.metrics.peers.set(len(self._links))
        link.lost.add_done_callback(lambda _lost: self._drop(where, link))
        seconds = time.perf_counter() - started
        self.metrics.connects.labels(self._carrier).observe(seconds)
        _log.info("connected to prefill agent %s in %.0f ms", link.name, seconds * 1e3)
        return link

    def _drop(self, where: tuple[str, int], link: _Link) -> None:
        if self._links.get(where) is link:
            del self._links[where]
        self.metrics.peers.set(len(self._links))
        _log.info("prefill agent %s is gone: %s", link.name, link.lost.result())
        task = asyncio.get_running_loop().create_task(self._part(link))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _part(self, link: _Link) -> None:
        await link.close()
        if link.peer is not None and link.peer.parked:
            self._parked.append(_Parked(link.peer, link.where, link.channel.peer.incarnation, time.monotonic()))
            if len(self._parked) > _MAX_PARKED:
                await self._bury(self._parked[0])

    async def _begin(self, link: _Link, ticket: Ticket) -> None:
        wire = ticket.to_wire()
        try:
            answer = await link.ask({"type": "begin", "ticket": wire}, _ANSWER_S)
        except BaseException:
            # Prefill may have granted it meanwhile; without this the export would be held until the link ends.
            link.channel.send({"type": "discard", "ticket": wire})
            raise
        if answer["type"] != "granted":
            raise Refused(f"{link.name} refused: {answer.get('reason')!s:.300}", code=f"{answer.get('code')!s:.40}")

    async def _read(self, link: _Link, ticket: Ticket, runs: list[Run], local: tuple[int, ...]) -> _Outcome:
        loop = asyncio.get_running_loop()
        if link.lost.done():
            raise PeerUnreachable(f"{link.name} was lost: {link.lost.result()}")
        read = loop.run_in_executor(link.executor, self._move, link, runs, local)
        link.reads.add(read)
        read.add_done_callback(link.reads.discard)
        try:
            ends: list[asyncio.Future[Any]] = [read, link.lost]
            await asyncio.wait(ends, timeout=self.config.read_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self._settle(link, read)
            link.channel.send({"type": "done", "nonce": ticket.nonce, "ok": False})
            raise
        if not read.done():
            raise self._give_up(link, read, len(local))
        try:
            outcome = read.result()
            if outcome.checksum != ticket.checksum:
                raise ChecksumMismatch(
                    f"the {len(local)} blocks read from {link.name} have checksum {outcome.checksum}, prefill exported "
                    f"{ticket.checksum}: the bytes are not the ones exported and were not used"
                )
        except TransferError as error:
            link.channel.send({"type": "done", "nonce": ticket.nonce, "ok": False})
            if link.lost.done() and not isinstance(error, ChecksumMismatch):
                raise PeerUnreachable(f"{link.name} was lost during the read: {link.lost.result()}") from error
            if isinstance(error, ReadFailed):
                link.fail(error)  # its backend's connection is closed: the next fetch makes a new one
            raise
        link.channel.send({"type": "done", "nonce": ticket.nonce, "ok": True})
        return outcome

    def _move(self, link: _Link, runs: list[Run], local: tuple[int, ...]) -> _Outcome:
        """In the link's thread: read, then hash what arrived."""
        assert link.peer is not None
        start = time.perf_counter()
        link.peer.read(runs)
        read = time.perf_counter()
        checksum = checksum_blocks(self._pool, local)
        end = time.perf_counter()
        transport = link.peer.transport(max(run.blocks for run in runs) * self.layout.block_bytes)
        if transport not in link.transports:
            link.transports.add(transport)
            _log.info("reads from %s go over %s: %s", link.name, transport.name, transport.detail)
        return _Outcome(read - start, end - read, checksum, transport)

    def _give_up(self, link: _Link, read: asyncio.Future[_Outcome], blocks: int) -> TransferError:
        """The error for a read that has not ended; its blocks are in quarantine until the backend has let go."""
        error: TransferError
        if link.lost.done():
            error = PeerUnreachable(f"{link.name} was lost during the read: {link.lost.result()}")
        else:
            error = ReadTimeout(f"the read from {link.name} took longer than {self.config.read_timeout_s:.1f} s")
            link.fail(error)
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._quarantine(blocks)

        def end(done: asyncio.Future[_Outcome]) -> None:
            self._quarantine(-blocks)
            if not done.cancelled():
                done.exception()  # looked at, so that asyncio does not report it as forgotten
            settled.set_result(None)

        read.add_done_callback(end)
        error.quarantine = settled
        return error

    def _quarantine(self, blocks: int) -> None:
        self._quarantined += blocks
        self.metrics.quarantined.set(self._quarantined)

    async def _settle(self, link: _Link, read: asyncio.Future[_Outcome]) -> None:
        """Wait until `read` has ended, cutting it off after the read timeout. Further cancellations are ignored."""
        limit = time.monotonic() + self.config.read_timeout_s
        while not read.done():
            left = limit - time.monotonic()
            if left <= 0:
                link.fail(ReadTimeout(f"a cancelled read from {link.name} did not end"))
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([read], timeout=left if left > 0 else None)
        if not read.cancelled() and isinstance(error := read.exception(), ReadFailed):
            link.fail(error)

    def _report(self, link: _Link, runs: list[Run], outcome: _Outcome, seconds: float) -> TransferReport:
        blocks = sum(run.blocks for run in runs)
        nbytes = blocks * self.layout.block_bytes
        transport = outcome.transport
        labels = (self._carrier, transport.name)
        self._bytes += nbytes
        self._transfers += 1
        self.metrics.bytes.labels(*labels, link.name).inc(nbytes)
        self.metrics.transfers.labels(*labels, link.name).inc()
        for phase, value in (
            ("total", seconds),
            ("read", outcome.read_seconds),
            ("checksum", outcome.checksum_seconds),
        ):
            self.metrics.seconds.labels(*labels, phase).observe(value)
        return TransferReport(
            bytes=nbytes,
            blocks=blocks,
            descriptors=len(runs),
            seconds=seconds,
            read_seconds=outcome.read_seconds,
            checksum_seconds=outcome.checksum_seconds,
            backend=self._carrier,
            transport=transport.name,
            transport_detail=transport.detail,
            peer=link.name,
        )

    async def close(self) -> None:
        """See :class:`TransferAgent`."""
        for link in list(self._links.values()):
            await link.close()
        if self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)
        for parked in list(self._parked):
            await self._bury(parked)
        await asyncio.to_thread(self._importer.close)

    def stats(self) -> dict[str, Any]:
        """Totals since the start, and the prefill workers connected now with the transports used."""
        return {
            "role": self.role.value,
            "name": self.name,
            "incarnation": self.incarnation,
            "backend": self._carrier,
            "path": self.config.path,
            "bytes": self._bytes,
            "transfers": self._transfers,
            "failures": self._failures,
            "quarantined_blocks": self._quarantined,
            "peers": [
                {
                    "name": link.name,
                    "incarnation": link.channel.peer.incarnation,
                    "transports": sorted({transport.name for transport in link.transports}),
                }
                for link in self._links.values()
            ],
        }
