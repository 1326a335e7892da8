"""The decode agent: takes a ticket, asks prefill's leave, reads what is final, verifies it, and says it is done."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from pdstack.transfer.agent import TransferAgent, TransferReport
from pdstack.transfer.audit import digest
from pdstack.transfer.backends import Peer
from pdstack.transfer.channel import connect
from pdstack.transfer.errors import PeerUnreachable, TicketError, TransferError
from pdstack.transfer.fetch import Fetch, Tools
from pdstack.transfer.incoming import Incoming
from pdstack.transfer.landing import Landing, Staging
from pdstack.transfer.layout import KVLayout, check_blocks
from pdstack.transfer.link import Expected, Link
from pdstack.transfer.paths import BACKEND, Importers
from pdstack.transfer.roles import Role
from pdstack.transfer.ticket import Ticket, verify
from pdstack.transfer.transport import Transport

_log = logging.getLogger(__name__)
# A parked peer is closed when a later read from the same place succeeds, but not before it had this time to see that
# its answer goes nowhere; and no more than so many are kept.
_PARKED_S = 2.0
_MAX_PARKED = 16
# Between two attempts to connect again, and how often one fetch may lose its link.
_RECONNECT_S = 0.1
# A connection that fails sooner than this was broken; one that fails later was not answered.
_BROKEN_S = 1.0
_MAX_RESUMES = 20


class _Parked(NamedTuple):
    peer: Peer
    where: tuple[str, int]
    incarnation: str
    since: float


class DecodeAgent(TransferAgent):
    """Imports KV. Created by :meth:`TransferAgent.create`."""

    role = Role.DECODE
    _importers: Importers

    async def start(self) -> None:
        """See :class:`TransferAgent`."""
        self._links: dict[tuple[str, int], Link] = {}
        self._locks: dict[tuple[str, int], asyncio.Lock] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._parked: list[_Parked] = []
        self._bytes = self._transfers = self._failures = self._quarantined = 0
        config = self.config
        self._tools = Tools(self._store, config, self.metrics, self.audit, self._quarantine)
        self._expected = Expected(config.backend, self.layout, self._store.hashing)
        self._importers = await asyncio.to_thread(Importers, config, self.name, self._store, self._identity)
        over = config.backend if config.path == BACKEND else f"path {config.path}"
        _log.info("decode agent %s imports KV over %s", self.name, over)

    async def fetch(self, ticket: Ticket, local_blocks: Sequence[int], held: int = 0) -> TransferReport:
        """See :class:`TransferAgent`."""
        started = time.perf_counter()
        fetch: Fetch | None = None
        try:
            check_blocks(local_blocks, self.layout.num_blocks, "local")
            self._check(ticket)
            fetch = Fetch(Incoming(ticket, local_blocks, held), self._tools)
            link = await self._bring(fetch)
        except TransferError as error:
            error.verified_blocks = fetch.incoming.verified_local if fetch is not None else 0
            self._failures += 1
            # What a forged ticket says must not become a label.
            worker = "?" if error.code == "forged" else ticket.worker
            self.metrics.failures.labels(self._carrier(fetch), worker, error.code).inc()
            _log.warning(
                "fetch of request %s from %s failed (%s): %s", ticket.request_id, ticket.worker, error.code, error
            )
            self._record(ticket, fetch, time.perf_counter() - started, error.code, str(error))
            raise
        except asyncio.CancelledError:
            self._record(ticket, fetch, time.perf_counter() - started, "cancelled", "")
            raise
        report = self._report(link, fetch, time.perf_counter() - started)
        self._record(ticket, fetch, report.seconds, "ok", "")
        if self._parked:
            await self._unpark(link)
        return report

    async def _bring(self, fetch: Fetch) -> Link:
        """Until all is here. Where the link is lost, over a new one."""
        link = await self._open(fetch.incoming)
        while True:
            try:
                await fetch.receive(link)
            except PeerUnreachable as error:
                if error.quarantine or fetch.resumes == _MAX_RESUMES:
                    raise
                loss = error
            else:
                return link
            finally:
                link.end(fetch.incoming)
            link = await self._resume(fetch, loss)

    async def _open(self, incoming: Incoming) -> Link:
        """The link to the ticket's worker, with prefill's leave to read over it."""
        for last in (False, True):
            began = time.monotonic()
            try:
                link = await self._link(incoming.ticket)
                self._fits(link, incoming)
                await link.begin(incoming)
            except PeerUnreachable as error:
                # A link that was lost while nothing went over it is noticed only now; one that breaks while it is made
                # is made once more. A peer that is gone, or silent, is not asked again.
                if last or error.gone or time.monotonic() - began > _BROKEN_S:
                    raise
            else:
                break
        return link

    def _fits(self, link: Link, incoming: Incoming) -> None:
        """Raises :class:`TicketError`, or ValueError for blocks that are not there."""
        ticket, theirs = incoming.ticket, link.layout
        if ticket.layout != theirs.fingerprint():
            raise TicketError(
                f"ticket of request {ticket.request_id!r} has KV layout {ticket.layout[:16]!r}, {link.name} has "
                f"{theirs.fingerprint()[:16]!r}: it was issued by another run, or for another model",
                code="layout",
            )
        check_blocks(ticket.blocks, theirs.num_blocks, f"{ticket.worker}'s")
        incoming.fit(theirs.block_size, self.layout.block_size)

    def _land(self, theirs: KVLayout) -> Landing:
        """Where blocks of a prefill agent land. Blocks."""
        if theirs.block_size == self.layout.block_size:
            return Landing(self._store, self._importers)
        return Staging(self._store, theirs, self.config, self.name, self._identity)

    async def _resume(self, fetch: Fetch, loss: PeerUnreachable) -> Link:
        """A new link over which prefill lets us go on. Raises `loss` if there is none in time, or prefill is gone."""
        incoming = fetch.incoming
        ticket, last = incoming.ticket, loss
        fetch.resumes += 1
        self.metrics.resumes.labels(ticket.worker).inc()
        _log.warning("request %s: %s; connecting again", ticket.request_id, loss)
        try:
            async with asyncio.timeout(self.config.resume_s):
                while True:
                    try:
                        link = await self._open(incoming)
                    except PeerUnreachable as error:
                        # A refused connection means that nobody listens: the process is gone, and the blocks with it.
                        if error.gone:
                            raise loss from error
                        last = error
                        await asyncio.sleep(_RECONNECT_S)
                    else:
                        break
        except TimeoutError:
            raise loss from last
        self.audit.record(
            "resumed",
            request=ticket.request_id,
            peer=ticket.worker,
            verified=incoming.verified,
            blocks=len(ticket.blocks),
            reason=str(loss),
        )
        return link

    async def discard(self, ticket: Ticket) -> None:
        """See :class:`TransferAgent`."""
        try:
            self._check(ticket)
            link = await self._link(ticket)
            link.channel.send({"type": "discard", "ticket": ticket.to_wire()})
        except TransferError as error:
            _log.info("could not discard the export of request %s: %s", ticket.request_id, error)

    def _check(self, ticket: Ticket) -> None:
        verify(ticket, self.config.cluster_key, audience=self._identity.audience)
        if ticket.backend != self.config.backend:
            raise TicketError(
                f"ticket of request {ticket.request_id!r} is for backend {ticket.backend!r}, this worker uses "
                f"{self.config.backend!r}: kv_transfer_backend must be the same on all workers",
                code="backend",
            )

    async def _link(self, ticket: Ticket) -> Link:
        where = (ticket.host, ticket.port)
        async with self._locks.setdefault(where, asyncio.Lock()):
            link = self._links.get(where)
            if link is not None and link.lost.done():
                del self._links[where]
                link = None
            if link is None:
                link = await self._connect(where)
        if (link.name, link.incarnation) != (ticket.worker, ticket.incarnation):
            raise TicketError(
                f"ticket of request {ticket.request_id!r} was issued by another run of {ticket.worker!r} than the one "
                f"at {ticket.host}:{ticket.port} ({link.name!r})",
                code="incarnation",
            )
        return link

    async def _connect(self, where: tuple[str, int]) -> Link:
        started = time.perf_counter()
        channel = await connect(*where, self._identity)
        link = Link(channel, where, self.config.heartbeat_s)
        try:
            await link.open(self._land, self._expected)
        except BaseException:
            await link.close()
            raise
        self._links[where] = link
        self.metrics.peers.set(len(self._links))
        link.lost.add_done_callback(lambda _lost: self._drop(where, link))
        seconds = time.perf_counter() - started
        self.metrics.connects.labels(self._carrier(None)).observe(seconds)
        _log.info("connected to prefill agent %s in %.0f ms", link.name, seconds * 1e3)
        return link

    def _drop(self, where: tuple[str, int], link: Link) -> None:
        if self._links.get(where) is link:
            del self._links[where]
        self.metrics.peers.set(len(self._links))
        _log.info("prefill agent %s is gone: %s", link.name, link.lost.result())
        task = asyncio.get_running_loop().create_task(self._part(link))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _part(self, link: Link) -> None:
        for peer in await link.close():
            self._parked.append(_Parked(peer, link.where, link.incarnation, time.monotonic()))
            if len(self._parked) > _MAX_PARKED:
                await self._bury(self._parked[0])

    async def _unpark(self, healthy: Link) -> None:
        """Close parked peers of the worker that has just served a read, and those of its earlier runs."""
        latest = time.monotonic() - _PARKED_S
        for parked in list(self._parked):
            known = parked.incarnation == healthy.incarnation
            if parked.where == healthy.where and (not known or parked.since <= latest):
                await self._bury(parked)

    async def _bury(self, parked: _Parked) -> None:
        if parked not in self._parked:
            return  # another fetch is closing it
        self._parked.remove(parked)
        await asyncio.to_thread(parked.peer.close)

    def _carrier(self, fetch: Fetch | None) -> str:
        """What carried most of a fetch: the backend's name, or "path"."""
        carried = fetch.carried if fetch is not None else {}
        most = max(carried, key=carried.__getitem__, default=self.config.path)
        return self.config.backend if most == BACKEND else "path"

    def _report(self, link: Link, fetch: Fetch, seconds: float) -> TransferReport:
        nbytes = fetch.bytes
        nothing = Transport("none", "all blocks were held already")
        transport = max(fetch.transports, key=fetch.transports.__getitem__, default=nothing)
        carrier = self._carrier(fetch)
        labels = (carrier, transport.name)
        self._bytes += nbytes
        self._transfers += 1
        self.metrics.bytes.labels(*labels, link.name).inc(nbytes)
        self.metrics.transfers.labels(*labels, link.name).inc()
        self.metrics.held.labels(link.name).inc(fetch.incoming.compared * self.layout.block_bytes)
        phases = {"total": seconds, "read": fetch.read_seconds, "checksum": fetch.checksum_seconds}
        for phase, value in phases.items():
            self.metrics.seconds.labels(*labels, phase).observe(value)
        assert fetch.incoming.first_token is not None
        return TransferReport(
            bytes=nbytes,
            blocks=fetch.blocks,
            held_blocks=fetch.incoming.compared,
            descriptors=fetch.descriptors,
            seconds=seconds,
            read_seconds=fetch.read_seconds,
            checksum_seconds=fetch.checksum_seconds,
            backend=carrier,
            transport=transport.name,
            transport_detail=transport.detail,
            peer=link.name,
            first_token=fetch.incoming.first_token,
            resumes=fetch.resumes,
        )

    def _record(self, ticket: Ticket, fetch: Fetch | None, seconds: float, verdict: str, reason: str) -> None:
        """The audit record of a transfer. Of a ticket that is not ours no more is written than what it claims to be."""
        if verdict == "forged" or fetch is None:
            self.audit.record("transfer", request=ticket.request_id, peer=ticket.worker, verdict=verdict, reason=reason)
            return
        incoming = fetch.incoming
        self.audit.record(
            "transfer",
            request=ticket.request_id,
            peer=ticket.worker,
            peer_incarnation=ticket.incarnation,
            blocks=list(ticket.blocks),
            generations=list(ticket.generations),
            local=list(incoming.local),
            held=incoming.held,
            verified=incoming.verified,
            paths=fetch.carried,
            transports=sorted(transport.name for transport in fetch.transports),
            bytes=fetch.bytes,
            hash=digest(incoming.hashes),
            resumes=fetch.resumes,
            retried=fetch.retried,
            seconds=round(seconds, 6),
            verdict=verdict,
            **({"reason": reason} if reason else {}),
        )

    def _quarantine(self, blocks: int) -> None:
        self._quarantined += blocks
        self.metrics.quarantined.set(self._quarantined)

    async def close(self) -> None:
        """See :class:`TransferAgent`."""
        for link in list(self._links.values()):
            link.fail(PeerUnreachable("the agent was closed"))
        while self._closing or self._links:
            await asyncio.gather(*self._closing, return_exceptions=True)
            await asyncio.sleep(0)
        for parked in list(self._parked):
            await self._bury(parked)
        await asyncio.to_thread(self._importers.close)
        self.audit.close()

    def stats(self) -> dict[str, Any]:
        """Totals since the start, and the prefill workers connected now, with the ways and transports used."""
        return {
            "role": self.role.value,
            "name": self.name,
            "incarnation": self.incarnation,
            "backend": self.config.backend,
            "path": self.config.path,
            "bytes": self._bytes,
            "transfers": self._transfers,
            "failures": self._failures,
            "quarantined_blocks": self._quarantined,
            "peers": [
                {
                    "name": link.name,
                    "incarnation": link.incarnation,
                    "paths": list(link.routes.choice.paths),
                    "bytes_per_second": {name: round(rate) for name, rate in link.routes.choice.rates().items()},
                    "transports": sorted({transport.name for transport in link.transports}),
                }
                for link in self._links.values()
            ],
        }
