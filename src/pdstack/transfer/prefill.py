"""The prefill agent: offers exports, and grants each to one authenticated decode agent, once and in time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from asyncio import StreamReader, StreamWriter
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

from pdstack.transfer.agent import TransferAgent
from pdstack.transfer.backends import Exporter, open_exporter
from pdstack.transfer.channel import MISSED_HEARTBEATS, Channel, accept, close_writer
from pdstack.transfer.checksum import checksum_blocks
from pdstack.transfer.errors import ProtocolError, Refused, TicketError, TransferError
from pdstack.transfer.exports import ExportBook, OnRelease
from pdstack.transfer.layout import check_blocks
from pdstack.transfer.paths import Offers
from pdstack.transfer.roles import ReleaseReason, Role
from pdstack.transfer.ticket import Ticket, issue, verify
from pdstack.transfer.wire import Message

_log = logging.getLogger(__name__)
# Connections that have not authenticated yet; more are closed at once.
_MAX_STRANGERS = 64


class PrefillAgent(TransferAgent):
    """Exports KV. Created by :meth:`TransferAgent.create`."""

    role = Role.PREFILL
    _exporter: Exporter
    _offers: Offers
    _server: asyncio.Server

    async def start(self) -> None:
        """See :class:`TransferAgent`."""
        loop = asyncio.get_running_loop()
        self._book = ExportBook(loop.time)
        self._timer: asyncio.TimerHandle | None = None
        self._strangers = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._peers: dict[Channel, str] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._exporter = await asyncio.to_thread(open_exporter, self.config.backend, self.name, self._view)
        try:
            self._offers = await asyncio.to_thread(
                Offers.open,
                self.config.path,
                self._pool,
                self._identity,
                listen_host=self.config.listen_host,
                advertise=self.config.advertise,
                patience_s=self.config.read_timeout_s,
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
        over = ", ".join([self.config.backend, *self._offers.names])
        _log.info("prefill agent %s exports KV over %s, control port %d", self.name, over, self.port)

    def export(
        self, request_id: str, blocks: Sequence[int], tokens: int, first_token: int, on_release: OnRelease
    ) -> Ticket:
        """See :class:`TransferAgent`."""
        self._book.check_new(request_id)
        check_blocks(blocks, self.layout.num_blocks, "exported")
        if not 0 < tokens <= len(blocks) * self.layout.block_size:
            raise ValueError(
                f"{tokens} tokens in {len(blocks)} blocks of {self.layout.block_size}, wanted 1 to all of them"
            )
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
            tokens=tokens,
            first_token=first_token,
            layout=self._fingerprint,
            checksum=checksum_blocks(self._pool, blocks),
            audience=self._identity.audience,
        )

        def released(released_id: str, reason: ReleaseReason) -> None:
            self.metrics.releases.labels(reason.value).inc()
            if reason is not ReleaseReason.READ:
                _log.info("export of request %s was released: %s", released_id, reason.value)
            on_release(released_id, reason)

        self._book.offer(ticket, self.config.ticket_ttl_s, released)
        self._changed()
        return ticket

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
            _log.warning("control connection from %s was refused: %s", peer[0] if peer else "?", error)
            return None
        finally:
            self._strangers -= 1

    async def _converse(self, channel: Channel) -> None:
        self._peers[channel] = channel.peer.name
        self.metrics.peers.set(len(self._peers))
        _log.info("decode agent %s connected", channel.peer.name)
        reason: object = "it closed the connection"
        try:
            channel.send(
                {
                    "type": "describe",
                    "backend": self.config.backend,
                    "layout": self._fingerprint,
                    "block_bytes": self.layout.block_bytes,
                    "num_blocks": self.layout.num_blocks,
                    "metadata": b64encode(self._exporter.metadata()).decode(),
                    "paths": self._offers.wire(),
                }
            )
            while True:
                self._answer(channel, await channel.receive(self.config.heartbeat_s * MISSED_HEARTBEATS))
        except TransferError as error:
            reason = error
        finally:
            del self._peers[channel]
            self.metrics.peers.set(len(self._peers))
            self._book.lost(channel)
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
                    self._book.grant(self._checked(message), channel)
                except TicketError as error:
                    self.metrics.refusals.labels(error.code).inc()
                    _log.warning("refused %s: %s", channel.peer.name, error)
                    channel.send({"type": "refused", "code": error.code, "reason": str(error), **reply})
                else:
                    channel.send({"type": "granted", **reply})
                self._changed()
            case "done":
                ticket = self._book.finish(str(message.get("nonce")), channel, message.get("ok") is True)
                if ticket is not None and message.get("ok") is True:
                    self.metrics.exported_bytes.labels(channel.peer.name).inc(
                        len(ticket.blocks) * self.layout.block_bytes
                    )
                self._changed()
            case "discard":
                with contextlib.suppress(TicketError):
                    self._book.discard(self._checked(message), channel)
                self._changed()
            case other:
                raise ProtocolError(f"{channel.peer.name} sent {other!r:.40}, which prefill does not know")

    def _checked(self, message: Message) -> Ticket:
        """The ticket in a message, if we issued it. Raises :class:`TicketError`."""
        ticket = Ticket.from_wire(message.get("ticket"))
        verify(ticket, self.config.cluster_key, audience=self._identity.audience, layout=self._fingerprint)
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
            "peers": sorted(self._peers.values()),
        }
