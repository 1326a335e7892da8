"""The prefill agent: offers exports, and grants each to one authenticated decode agent, once and in time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from asyncio import StreamReader, StreamWriter
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

from pdstack.transfer.agent import TransferAgent
from pdstack.transfer.audit import digest
from pdstack.transfer.backends import Exporter, NoExporter, open_exporter
from pdstack.transfer.channel import MISSED_HEARTBEATS, Channel, accept, close_writer
from pdstack.transfer.errors import ProtocolError, Refused, TicketError, TransferError
from pdstack.transfer.exports import Export, ExportBook, OnRelease, Reader, announcements
from pdstack.transfer.layout import check_blocks
from pdstack.transfer.paths import Offers
from pdstack.transfer.roles import ReleaseReason, Role
from pdstack.transfer.ticket import MAX_BLOCKS, Ticket, issue, verify
from pdstack.transfer.wire import Message

_log = logging.getLogger(__name__)
# Connections that have not authenticated yet; more are closed at once.
_MAX_STRANGERS = 64


class PrefillAgent(TransferAgent):
    """Exports KV. Created by :meth:`TransferAgent.create`."""

    role = Role.PREFILL
    _offers: Offers
    _server: asyncio.Server

    async def start(self) -> None:
        """See :class:`TransferAgent`."""
        loop = asyncio.get_running_loop()
        self._book = ExportBook(loop.time, self.config.resume_s, self._released)
        self._timer: asyncio.TimerHandle | None = None
        self._strangers = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._channels: dict[object, Channel] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._exporter: Exporter = NoExporter()
        if self._store.kind == "host":
            self._exporter = await asyncio.to_thread(open_exporter, self.config.backend, self.name, self._store.view)
        try:
            self._offers = await asyncio.to_thread(
                Offers.open,
                self.config.path,
                self._store,
                self._identity,
                listen_host=self.config.listen_host,
                advertise=self.config.advertise,
                patience_s=self.config.read_timeout_s,
                stream_port=self.config.stream_port,
                shared_directory=self.config.shared_directory,
            )
        except BaseException:
            self._exporter.close()
            raise
        try:
            self._server = await asyncio.start_server(self._serve, self.config.listen_host, self.config.listen_port)
        except BaseException:
            self._offers.close()
            self._exporter.close()
            raise
        self.port: int = self._server.sockets[0].getsockname()[1]
        backend = [self.config.backend] if self._store.kind == "host" else []
        over = ", ".join([*backend, *self._offers.names])
        _log.info("prefill agent %s exports KV over %s, control port %d", self.name, over, self.port)

    def export(
        self,
        request_id: str,
        blocks: Sequence[int],
        tokens: int,
        first_token: int | None,
        on_release: OnRelease,
        generations: Sequence[int] | None = None,
    ) -> Ticket:
        """See :class:`TransferAgent`."""
        self._book.check_new(request_id)
        check_blocks(blocks, self.layout.num_blocks, "exported")
        if not 0 < tokens <= len(blocks) * self.layout.block_size:
            raise ValueError(
                f"{tokens} tokens in {len(blocks)} blocks of {self.layout.block_size}, wanted 1 to all of them"
            )
        if generations is None:
            generations = self._generations(blocks) if self._generations is not None else [0] * len(blocks)
        ticket = issue(
            self.config.cluster_key,
            ttl_s=self.config.ticket_ttl_s,
            request_id=request_id,
            worker=self.name,
            incarnation=self.incarnation,
            host=self.config.advertise,
            port=self.port,
            backend=self.config.backend,
            blocks=tuple(int(block) for block in blocks),
            generations=tuple(int(generation) for generation in generations),
            tokens=tokens,
            layout=self._fingerprint,
            audience=self._identity.audience,
        )
        self._book.offer(ticket, self.config.ticket_ttl_s, on_release)
        if first_token is not None:
            self.complete(request_id, first_token)
        self._changed()
        return ticket

    def advance(self, request_id: str, ready: int) -> None:
        """See :class:`TransferAgent`."""
        export = self._book.of_request(request_id)
        if export is None:
            return
        blocks = export.ticket.blocks[export.final : ready]
        if blocks:
            # Hashed at once: whatever happens to these bytes later is found out.
            export.hashes += self._store.hashes(blocks).tolist()
            self._tell(export)

    def complete(self, request_id: str, first_token: int) -> None:
        """See :class:`TransferAgent`."""
        export = self._book.of_request(request_id)
        if export is not None:
            self.advance(request_id, len(export.ticket.blocks))
            export.first_token = first_token
            self._tell(export)

    def fail(self, request_id: str, reason: str) -> None:
        """See :class:`TransferAgent`."""
        export = self._book.of_request(request_id)
        if export is not None:
            self._end(export, ReleaseReason.UNCOMPUTED, reason)

    def _end(self, export: Export, reason: ReleaseReason, why: str) -> None:
        """Release an export that cannot be read any more, and tell its reader."""
        if export.reader is not None and not export.suspended:
            channel = self._channels[export.reader.channel]
            channel.send({"type": "failed", "nonce": export.ticket.nonce, "reason": why[:300]})
        self._book.release(export, reason)
        self._changed()

    def _tell(self, export: Export) -> None:
        """Announce to the reader what it may read, if there is a reader."""
        if export.reader is not None and not export.suspended:
            self._announce(self._channels[export.reader.channel])

    def _announce(self, channel: Channel) -> None:
        """What became final since, request by request, as far as the window of this reader goes."""
        exports = list(self._book.of_channel(channel))
        for export, first, last in announcements(exports, self.layout.block_bytes, self.config.window_bytes):
            hashes = export.hashes[first:last]
            channel.send({"type": "ready", "nonce": export.ticket.nonce, "first": first, "hashes": hashes})
        for export in exports:
            if export.complete and export.announced == len(export.ticket.blocks) and not export.closing_sent:
                export.closing_sent = True
                token = export.first_token
                channel.send({"type": "computed", "nonce": export.ticket.nonce, "first_token": token})

    def _stale(self, ticket: Ticket) -> bool:
        """True if a block has had another owner since the ticket was issued."""
        return self._generations is not None and tuple(self._generations(ticket.blocks)) != ticket.generations

    def _released(self, export: Export, reason: ReleaseReason) -> None:
        """Once for every export: the record of it."""
        self.metrics.releases.labels(reason.value).inc()
        if reason is not ReleaseReason.READ:
            _log.info("export of request %s was released: %s", export.ticket.request_id, reason.value)
        reader = export.reader
        self.audit.record(
            "export",
            request=export.ticket.request_id,
            peer=reader.name if reader else None,
            peer_incarnation=reader.incarnation if reader else None,
            blocks=list(export.ticket.blocks),
            generations=list(export.ticket.generations),
            final=export.final,
            bytes=export.announced * self.layout.block_bytes,
            hash=digest(export.hashes),
            seconds=round(time.time() - export.ticket.issued_at, 3),
            verdict="ok" if reason is ReleaseReason.READ else reason.value,
        )

    async def withdraw(self, request_id: str) -> bool:
        """See :class:`TransferAgent`."""
        withdrawn = self._book.withdraw(request_id)
        self._changed()
        return withdrawn

    async def drain(self, timeout_s: float) -> bool:
        """See :class:`TransferAgent`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _changed(self) -> None:
        """After every change of the book: expire, re-arm the one timer, show the counts."""
        wait = self._book.expire()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if wait is None else asyncio.get_running_loop().call_later(wait, self._changed)
        offered, granted = self._book.counts()
        self.metrics.exports.labels("offered").set(offered)
        self.metrics.exports.labels("granted").set(granted)
        if offered + granted:
            self._idle.clear()
        else:
            self._idle.set()

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            channel = await self._admit(reader, writer)
            if channel is not None:
                await self._converse(channel)
        except asyncio.CancelledError:
            # The agent is closing. Ending normally keeps asyncio's stream callback from reporting it as a failure.
            pass
        finally:
            await close_writer(writer)

    async def _admit(self, reader: StreamReader, writer: StreamWriter) -> Channel | None:
        """The authenticated channel, or None for a stranger."""
        if self._strangers >= _MAX_STRANGERS:
            self.metrics.rejected_connections.labels("too_many").inc()
            return None
        self._strangers += 1
        try:
            return await accept(reader, writer, self._identity)
        except TransferError as error:
            peer = writer.get_extra_info("peername")
            self.metrics.rejected_connections.labels(error.code).inc()
            self.audit.record(
                "rejected", address=peer[0] if peer else None, verdict=error.code, reason=f"{error!s:.300}"
            )
            _log.warning("control connection from %s was refused: %s", peer[0] if peer else "?", error)
            return None
        finally:
            self._strangers -= 1

    async def _converse(self, channel: Channel) -> None:
        self._channels[channel] = channel
        self.metrics.peers.set(len(self._channels))
        _log.info("decode agent %s connected", channel.peer.name)
        reason: object = "it closed the connection"
        try:
            channel.send(
                {
                    "type": "describe",
                    "backend": self.config.backend,
                    "layout": self._fingerprint,
                    "block_size": self.layout.block_size,
                    "num_blocks": self.layout.num_blocks,
                    "hashing": self._store.hashing,
                    "metadata": b64encode(self._exporter.metadata()).decode(),
                    "paths": self._offers.wire(),
                }
            )
            while True:
                self._answer(channel, await channel.receive(self.config.heartbeat_s * MISSED_HEARTBEATS))
        except TransferError as error:
            reason = error
        finally:
            del self._channels[channel]
            self.metrics.peers.set(len(self._channels))
            for export in self._book.lost(channel):
                self.audit.record("suspended", request=export.ticket.request_id, peer=channel.peer.name)
            self._changed()
            _log.info("decode agent %s is gone: %s", channel.peer.name, reason)

    def _answer(self, channel: Channel, message: Message) -> None:
        match message["type"]:
            case "ping":
                channel.send({"type": "pong"})
                self._exporter.tend()
                self._offers.tend()
            case "begin":
                reply = {"id": message.get("id")}
                try:
                    export = self._grant(channel, message)
                except TicketError as error:
                    self.metrics.refusals.labels(error.code).inc()
                    _log.warning("refused %s: %s", channel.peer.name, error)
                    self.audit.record(
                        "refused",
                        peer=channel.peer.name,
                        peer_incarnation=channel.peer.incarnation,
                        verdict=error.code,
                        reason=str(error),
                    )
                    channel.send({"type": "refused", "code": error.code, "reason": str(error), **reply})
                else:
                    channel.send({"type": "granted", **reply})
                    self._tell(export)
                self._changed()
            case "ack":
                self._book.acknowledge(str(message.get("nonce")), channel, _count(message, "count"))
                self._announce(channel)
            case "done":
                self._finish(channel, str(message.get("nonce")), message.get("ok") is True)
                self._changed()
            case "discard":
                with contextlib.suppress(TicketError):
                    self._book.discard(self._checked(message), channel)
                self._changed()
            case other:
                raise ProtocolError(f"{channel.peer.name} sent {other!r:.40}, which prefill does not know")

    def _grant(self, channel: Channel, message: Message) -> Export:
        """Raises :class:`TicketError`."""
        ticket, begin = self._checked(message), _count(message, "from")
        export = self._book.grant(ticket, Reader(channel.peer.name, channel.peer.incarnation, channel))
        if self._stale(ticket):
            _log.error("request %s: its blocks were given away while they were exported", ticket.request_id)
            self._end(export, ReleaseReason.STALE, "the blocks were given away while they were exported")
            raise Refused(
                f"the blocks of request {ticket.request_id!r} are not what they were when it was issued",
                code="generation",
            )
        # A reader that comes back has the hashes of so many blocks already, and takes no more room in its window.
        export.announced = export.acknowledged = min(begin, export.final)
        return export

    def _finish(self, channel: Channel, nonce: str, ok: bool) -> None:
        export = self._book.held(nonce, channel)
        if export is None:
            return
        if ok and self._stale(export.ticket):
            # The bytes that decode has are right, for their hashes were taken in time; the next reader's would not be.
            _log.error("request %s: its blocks were given away while they were read", export.ticket.request_id)
            self._book.release(export, ReleaseReason.STALE)
            return
        if ok:
            self.metrics.exported_bytes.labels(channel.peer.name).inc(export.announced * self.layout.block_bytes)
        self._book.release(export, ReleaseReason.READ if ok else ReleaseReason.FAILED)

    def _checked(self, message: Message) -> Ticket:
        """The ticket in a message, if we issued it. Raises :class:`TicketError`."""
        ticket = Ticket.from_wire(message.get("ticket"))
        verify(ticket, self.config.cluster_key, audience=self._identity.audience)
        if ticket.worker != self.name:
            raise Refused(f"the ticket is of worker {ticket.worker!r}, this is {self.name!r}", code="worker")
        if ticket.incarnation != self.incarnation:
            raise Refused(f"the ticket was issued before {self.name!r} was restarted", code="incarnation")
        return ticket

    async def close(self) -> None:
        """See :class:`TransferAgent`."""
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.to_thread(self._offers.close)
        await asyncio.to_thread(self._exporter.close)
        self._book.close()
        self.audit.close()

    def stats(self) -> dict[str, Any]:
        """Exports held now by state, and the decode workers connected."""
        offered, granted = self._book.counts()
        return {
            "role": self.role.value,
            "name": self.name,
            "incarnation": self.incarnation,
            "backend": self.config.backend,
            "paths": self._offers.names,
            "exports": {"offered": offered, "granted": granted},
            "peers": sorted(channel.peer.name for channel in self._channels.values()),
        }


def _count(message: Message, field: str) -> int:
    """A number of blocks in a message. Raises :class:`ProtocolError`."""
    value = message.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_BLOCKS:
        raise ProtocolError(f"{field} is {value!r:.40}, wanted a number of blocks")
    return value
