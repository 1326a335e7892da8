"""One fetch: what it reads, over which way, what it does when bytes are wrong, late, or cut off. It outlives a link."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from pdstack.transfer.audit import AuditLog
from pdstack.transfer.choice import Change
from pdstack.transfer.config import TransferConfig
from pdstack.transfer.errors import ChecksumMismatch, PeerUnreachable, ReadFailed, ReadTimeout, TransferError
from pdstack.transfer.incoming import Incoming
from pdstack.transfer.layout import count_runs
from pdstack.transfer.link import Link
from pdstack.transfer.metrics import TransferMetrics
from pdstack.transfer.paths import BACKEND
from pdstack.transfer.store import BlockStore, Hashes
from pdstack.transfer.transport import Transport

_log = logging.getLogger(__name__)
# How long a read that was cut off may take to end before its blocks go into quarantine.
_CUT_S = 2.0


@dataclass(frozen=True)
class Tools:
    """What a fetch needs of its agent. `quarantine` counts blocks that a read given up may still write."""

    store: BlockStore
    config: TransferConfig
    metrics: TransferMetrics
    audit: AuditLog
    quarantine: Callable[[int], None]


class _Outcome(NamedTuple):
    hashes: Hashes
    read_seconds: float
    checksum_seconds: float
    transport: Transport
    descriptors: int

    @property
    def seconds(self) -> float:
        """Until the blocks were known to be right: some ways hash while they read."""
        return self.read_seconds + self.checksum_seconds


class Fetch:
    """Brings one prompt's KV. `path` is the way in use for it, None until the first read."""

    def __init__(self, incoming: Incoming, tools: Tools) -> None:
        self.incoming, self._tools = incoming, tools
        self.path: str | None = None
        self.retried = False
        self.resumes = self.bytes = self.blocks = self.descriptors = 0
        self.read_seconds = self.checksum_seconds = 0.0
        self.carried: dict[str, int] = {}
        self.transports: dict[Transport, int] = {}
        self._reconnected = False

    async def receive(self, link: Link) -> None:
        """Over one link: read what is final, until all is, or the link is lost."""
        incoming = self.incoming
        while not incoming.complete:
            incoming.changed.clear()
            try:
                if incoming.failure is not None:
                    raise TransferError(
                        f"{link.name} could not compute the prompt of request {incoming.ticket.request_id!r}: "
                        f"{incoming.failure}",
                        code="prefill_failed",
                    )
                if places := incoming.waiting()[: link.landing.most]:
                    await self._take(link, places)
                    link.acknowledge(incoming)
                    continue
            except TransferError as error:
                if link.lost.done():
                    if isinstance(error, ReadFailed) and not error.quarantine:
                        raise lost(link, "during the read") from error
                    raise
                link.done(incoming.ticket, ok=False)
                if isinstance(error, ReadFailed):
                    link.fail(error)  # nothing reads over it any more: the next fetch makes a new one
                raise
            except asyncio.CancelledError:
                link.done(incoming.ticket, ok=False)
                raise
            await self._more(link)
        link.done(incoming.ticket, ok=True)

    async def _more(self, link: Link) -> None:
        """Wait for news from prefill."""
        incoming = self.incoming
        changed = asyncio.ensure_future(incoming.changed.wait())
        try:
            ends: list[asyncio.Future[Any]] = [changed, link.lost]
            await asyncio.wait(ends, timeout=self._tools.config.stall_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            link.done(incoming.ticket, ok=False)
            raise
        finally:
            changed.cancel()
        if incoming.changed.is_set():
            return
        if link.lost.done():
            raise lost(link, "while the prompt was computed")
        link.done(incoming.ticket, ok=False)
        raise TransferError(
            f"{link.name} has {len(incoming.hashes)} of {len(incoming.ticket.blocks)} blocks ready and made no more in "
            f"{self._tools.config.stall_timeout_s:.0f} s: it is overloaded or stuck; raise stall_timeout_s if prompts "
            "take that long",
            code="prefill_stalled",
        )

    async def _take(self, link: Link, places: list[int]) -> None:
        """Read and verify the blocks at `places`. What differs is read once more, over another way if there is one."""
        incoming = self.incoming
        if link.lost.done():
            raise lost(link, "before a read")
        if held := [place for place in places if place < incoming.compared]:
            blocks = [incoming.local[place] for place in held]
            found = await asyncio.get_running_loop().run_in_executor(link.executor, self._tools.store.hashes, blocks)
            if wrong := incoming.compare(held, found):
                raise ChecksumMismatch(
                    f"{len(wrong)} of {incoming.compared} blocks of a prefix that this worker holds are not what "
                    f"{link.name} computed for it: the prefix was not used",
                    code="prefix",
                )
        if moved := [place for place in places if place >= incoming.compared]:
            wrong = await self._move(link, moved)
            if wrong and not self.retried:
                self.retried = True
                before = self.path or link.routes.choice.current
                self.path = link.routes.choice.other(before) or before
                self._tools.metrics.retries.labels(link.name).inc()
                self._tools.audit.record(
                    "mismatch", request=incoming.ticket.request_id, peer=link.name, path=before, again=self.path,
                    blocks=[incoming.ticket.blocks[place] for place in wrong],
                )  # fmt: skip
                _log.error(
                    "request %s: %d blocks came from %s over %s with other bytes than exported: reading them over %s",
                    incoming.ticket.request_id, len(wrong), link.name, before, self.path,
                )  # fmt: skip
                wrong = await self._move(link, wrong)
            if wrong:
                raise ChecksumMismatch(
                    f"{len(wrong)} of {len(incoming.ticket.blocks)} blocks read from {link.name} have other hashes "
                    "than prefill exported: the bytes are not the ones exported and were not used"
                )

    async def _move(self, link: Link, places: list[int]) -> list[int]:
        """Read the blocks at `places`; returns the places of those whose hash is wrong."""
        while True:
            if self.path not in link.routes.choice.paths:  # the first read, or that way was dropped meanwhile
                self.path = link.routes.choice.pick()
            path = self.path
            assert path is not None
            try:
                outcome = await self._read(link, path, places)
            except ReadFailed as error:
                if link.lost.done() or error.quarantine:
                    raise
                other = link.routes.choice.other(path)
                if other is None and self._reconnected:
                    raise
                self._reconnected = True
                loop = asyncio.get_running_loop()
                if other is None:
                    _log.warning("a read from %s failed: %s; connecting again", link.name, error)
                    await loop.run_in_executor(link.executor, link.routes.forget, path)
                else:
                    self.path = other
                    change = await loop.run_in_executor(link.executor, link.routes.drop, path, str(error))
                    if change is not None:
                        self._changed(link, change)
                continue
            break
        nbytes = len(places) * link.layout.block_bytes
        self.bytes += nbytes
        self.blocks += len(places)
        self.descriptors += outcome.descriptors
        self.read_seconds += outcome.read_seconds
        self.checksum_seconds += outcome.checksum_seconds
        self.carried[path] = self.carried.get(path, 0) + nbytes
        self.transports[outcome.transport] = self.transports.get(outcome.transport, 0) + nbytes
        if outcome.transport not in link.transports:
            link.transports.add(outcome.transport)
            _log.info("reads from %s go over %s: %s", link.name, outcome.transport.name, outcome.transport.detail)
        if (change := link.routes.choice.note(path, nbytes, outcome.seconds)) is not None:
            self._changed(link, change)
        tried = path == BACKEND and path != link.routes.choice.current
        if tried and not outcome.transport.one_sided and not link.lost.done():
            # Slow, and a reader that dies in the middle of such a read can take prefill with it: not to be tried again.
            await asyncio.get_running_loop().run_in_executor(
                link.executor, link.routes.drop, path, f"{outcome.transport.name} is emulated"
            )
        return self.incoming.compare(places, outcome.hashes)

    async def _read(self, link: Link, path: str, places: list[int]) -> _Outcome:
        loop = asyncio.get_running_loop()
        if link.lost.done():
            raise lost(link, "before a read")
        read = loop.run_in_executor(link.executor, self._copy, link, path, places)
        link.reads.add(read)
        read.add_done_callback(link.reads.discard)
        try:
            ends: list[asyncio.Future[Any]] = [read, link.lost]
            await asyncio.wait(ends, timeout=self._tools.config.read_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not read.done() and link.lost.done():
                await asyncio.wait([read], timeout=_CUT_S)  # it was cut off, and mostly ends at once
        except asyncio.CancelledError:
            await self._settle(link, read)
            raise
        if not read.done():
            raise self._give_up(link, read, len(places))
        return read.result()

    def _copy(self, link: Link, path: str, places: list[int]) -> _Outcome:
        """In the link's thread: read, hash what arrived if the way did not, and put what is right where it belongs."""
        landing, incoming = link.landing, self.incoming
        remote = [incoming.ticket.blocks[place] for place in places]
        local = landing.targets(incoming, places)
        try:
            peer = link.routes.peer(path)
        except ReadFailed:
            raise
        except TransferError as error:
            raise ReadFailed(f"{link.name} cannot be read over {path}: {error}", code=error.code) from error
        start = time.perf_counter()
        hashes = peer.read_blocks(remote, local)
        read = end = time.perf_counter()
        if hashes is None:
            hashes = landing.store.hashes(local)
            end = time.perf_counter()
        landing.settle(incoming, incoming.right(places, hashes))
        runs, longest = count_runs(remote, local)
        transport = peer.transport(longest * link.layout.block_bytes)
        return _Outcome(hashes, read - start, end - read, transport, runs)

    def _changed(self, link: Link, change: Change) -> None:
        """Another way is in use: never silently."""
        rates = [f"{rate / 1e9:.2f} GB/s" if rate else "unmeasured" for rate in (change.before_rate, change.after_rate)]
        _log.warning(
            "KV from %s goes over %s (%s) instead of %s (%s) from now on: %s",
            link.name, change.after, rates[1], change.before, rates[0], change.reason,
        )  # fmt: skip
        self._tools.metrics.path_changes.labels(link.name, change.before, change.after).inc()
        self._tools.audit.record("path_changed", peer=link.name, **change._asdict())

    def _give_up(self, link: Link, read: asyncio.Future[_Outcome], blocks: int) -> TransferError:
        """The error for a read that has not ended; its blocks are in quarantine until it has."""
        error: TransferError
        if link.lost.done():
            error = lost(link, "during the read")
        else:
            error = ReadTimeout(f"the read from {link.name} took longer than {self._tools.config.read_timeout_s:.1f} s")
            link.fail(error)
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tools.quarantine(blocks)
        self._tools.audit.record("quarantine", peer=link.name, blocks=blocks, reason=str(error))

        def end(done: asyncio.Future[_Outcome]) -> None:
            self._tools.quarantine(-blocks)
            self._tools.audit.record("settled", peer=link.name, blocks=blocks)
            if not done.cancelled():
                done.exception()  # looked at, so that asyncio does not report it as forgotten
            settled.set_result(None)

        read.add_done_callback(end)
        error.quarantine = settled
        return error

    async def _settle(self, link: Link, read: asyncio.Future[_Outcome]) -> None:
        """Wait until `read` has ended, cutting it off after the read timeout. Further cancellations are ignored."""
        limit = time.monotonic() + self._tools.config.read_timeout_s
        while not read.done():
            left = limit - time.monotonic()
            if left <= 0:
                link.fail(ReadTimeout(f"a cancelled read from {link.name} did not end"))
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([read], timeout=left if left > 0 else None)
        if not read.cancelled() and isinstance(error := read.exception(), ReadFailed):
            link.fail(error)


def lost(link: Link, when: str) -> PeerUnreachable:
    """The error of a link that is lost."""
    return PeerUnreachable(f"{link.name} was lost {when}: {link.lost.result()}")
