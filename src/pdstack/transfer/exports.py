"""Prefill's book of exports: who may read what, and when blocks may be reused. A state machine, without I/O.

An export is *offered* until its deadline. A reader that asks in time gets it *granted*, once; from then on the deadline
means nothing. It ends by the reader's word; or, where the reader's connection is lost, it is *suspended* and ends a
while later unless the same reader (name and incarnation) comes back and goes on. A granted export is never released for
any other reason, so blocks are not reused under a running read whose result could count.

Blocks become final from the front while the prompt is computed: `hashes` has one entry for each that is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pdstack.transfer.errors import Refused, TransferError
from pdstack.transfer.roles import ReleaseReason
from pdstack.transfer.ticket import Ticket

# So many ended exports are remembered, to tell "expired" and "replayed" from "unknown".
_REMEMBERED = 4096

OnRelease = Callable[[str, ReleaseReason], None]


class Reader(NamedTuple):
    """Who reads: the authenticated decode agent, and the connection over which it asks."""

    name: str
    incarnation: str
    channel: object

    def same_agent(self, other: Reader) -> bool:
        """True for two connections of one running agent."""
        return (self.name, self.incarnation) == (other.name, other.incarnation)


@dataclass(eq=False)
class Export:
    """One export that is held. `deadline` counts while nobody has it, and while it is suspended."""

    ticket: Ticket
    deadline: float
    on_release: OnRelease
    reader: Reader | None = None
    suspended: bool = False
    hashes: list[int] = field(default_factory=list)
    first_token: int | None = None
    announced: int = 0
    acknowledged: int = 0
    closing_sent: bool = False

    @property
    def final(self) -> int:
        """Blocks that are final, and hashed."""
        return len(self.hashes)

    @property
    def complete(self) -> bool:
        """True once the first token is known; then all blocks are final."""
        return self.first_token is not None


class ExportBook:
    """All exports of one prefill agent. `now` is a monotonic clock in seconds, `grace_s` how long one is suspended.

    `on_end` is called for every export that ends, before its owner hears of it.
    """

    def __init__(
        self,
        now: Callable[[], float],
        grace_s: float,
        on_end: Callable[[Export, ReleaseReason], None] = lambda _export, _reason: None,
    ) -> None:
        self._now, self._grace_s, self._on_end = now, grace_s, on_end
        self._held: dict[str, Export] = {}
        self._by_request: dict[str, str] = {}
        self._ended: OrderedDict[str, ReleaseReason] = OrderedDict()

    def counts(self) -> tuple[int, int]:
        """(offered, granted); suspended ones are granted."""
        granted = sum(export.reader is not None for export in self._held.values())
        return len(self._held) - granted, granted

    def check_new(self, request_id: str) -> None:
        """Raise :class:`TransferError` if `request_id` is exported now."""
        if request_id in self._by_request:
            raise TransferError(
                f"request {request_id!r} is exported already: withdraw it first, or use one id per prefill attempt",
                code="duplicate",
            )

    def offer(self, ticket: Ticket, ttl_s: float, on_release: OnRelease) -> Export:
        """Hold an export until it is read, or for `ttl_s` seconds if nobody asks."""
        self.check_new(ticket.request_id)
        export = Export(ticket, self._now() + ttl_s, on_release)
        self._held[ticket.nonce] = export
        self._by_request[ticket.request_id] = ticket.nonce
        return export

    def of_request(self, request_id: str) -> Export | None:
        """The export of a request, if it is held."""
        return self._held.get(self._by_request.get(request_id, ""))

    def of_channel(self, channel: object) -> Iterable[Export]:
        """What is granted over a connection, in the order of the offers."""
        return (export for export in self._held.values() if export.reader and export.reader.channel is channel)

    def grant(self, ticket: Ticket, reader: Reader) -> Export:
        """Let `reader` read, or go on reading after it lost its connection.

        Raises :class:`Refused` with code expired, replayed, withdrawn, lost, unknown or altered.
        """
        self.expire()
        export = self._held.get(ticket.nonce)
        if export is None:
            raise _refusal(ticket, self._ended.get(ticket.nonce))
        if export.ticket != ticket:
            raise Refused(f"ticket of request {ticket.request_id!r} is not the one that was issued", code="altered")
        holder = export.reader
        if holder is not None and (not holder.same_agent(reader) or holder.channel is reader.channel):
            raise _refusal(ticket, ReleaseReason.READ)
        export.reader, export.suspended, export.closing_sent = reader, False, False
        return export

    def acknowledge(self, nonce: str, channel: object, count: int) -> None:
        """The reader has dealt with the first `count` blocks. What was not announced cannot be acknowledged."""
        export = self.held(nonce, channel)
        if export is not None:
            export.acknowledged = max(export.acknowledged, min(count, export.announced))

    def held(self, nonce: str, channel: object) -> Export | None:
        """The export that is granted over this connection; None if there is no such."""
        export = self._held.get(nonce)
        return export if export is not None and export.reader and export.reader.channel is channel else None

    def discard(self, ticket: Ticket, channel: object) -> bool:
        """The reader does not need the export; False if it is not held, or held over another connection."""
        export = self._held.get(ticket.nonce)
        if export is None or export.ticket != ticket or (export.reader and export.reader.channel is not channel):
            return False
        self.release(export, ReleaseReason.DISCARDED)
        return True

    def withdraw(self, request_id: str) -> bool:
        """Take an offer back; False if there is none, or if a reader has it (then its end releases it)."""
        export = self.of_request(request_id)
        if export is None or export.reader is not None:
            return False
        self.release(export, ReleaseReason.WITHDRAWN)
        return True

    def lost(self, channel: object) -> list[Export]:
        """A connection is gone: what was granted over it is suspended. Returns that."""
        suspended = list(self.of_channel(channel))
        for export in suspended:
            export.suspended, export.deadline = True, self._now() + self._grace_s
        return suspended

    def expire(self) -> float | None:
        """Release what is past its deadline; the seconds until the next deadline, None if there is none."""
        now = self._now()
        counting = [export for export in self._held.values() if export.reader is None or export.suspended]
        for export in counting:
            if export.deadline <= now:
                self.release(export, ReleaseReason.PEER_LOST if export.suspended else ReleaseReason.EXPIRED)
        return min((export.deadline - now for export in counting if export.deadline > now), default=None)

    def close(self) -> None:
        """Release everything. The pool must not be readable any more."""
        for export in list(self._held.values()):
            self.release(export, ReleaseReason.CLOSED)

    def release(self, export: Export, reason: ReleaseReason) -> None:
        """End an export that is held."""
        nonce = export.ticket.nonce
        del self._held[nonce]
        del self._by_request[export.ticket.request_id]
        self._ended[nonce] = reason
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
        self._on_end(export, reason)
        export.on_release(export.ticket.request_id, reason)


def announcements(exports: Sequence[Export], block_bytes: int, window_bytes: int) -> Iterable[tuple[Export, int, int]]:
    """What to announce to one reader now: (export, first block, end), and it counts as announced.

    No more than `window_bytes` (or one block) are announced and not yet acknowledged; the exports share what is left of
    that evenly, one slice after the other, so that a long prompt does not keep a short one waiting.
    """
    under_way = sum(export.announced - export.acknowledged for export in exports)
    room = max(1, window_bytes // block_bytes) - under_way
    waiting = [export for export in exports if export.announced < export.final]
    while room > 0 and waiting:
        share = max(1, room // len(waiting))
        for export in list(waiting):
            count = min(share, room, export.final - export.announced)
            if count:
                yield export, export.announced, export.announced + count
                export.announced += count
                room -= count
            if export.announced == export.final:
                waiting.remove(export)


def _refusal(ticket: Ticket, ended: ReleaseReason | None) -> Refused:
    about = f"ticket of request {ticket.request_id!r}"
    if ended is None:
        return Refused(f"{about} names no export of this worker", code="unknown")
    if ended is ReleaseReason.EXPIRED:
        return Refused(
            f"{about} was not taken up before its deadline; raise ticket_ttl_s if decode is slow", code="expired"
        )
    if ended is ReleaseReason.WITHDRAWN:
        return Refused(f"{about} was withdrawn by prefill", code="withdrawn")
    if ended is ReleaseReason.UNCOMPUTED:
        return Refused(f"the prompt of {about} could not be computed", code="prefill_failed")
    if ended is ReleaseReason.STALE:
        return Refused(f"the blocks of {about} are not what they were when it was issued", code="generation")
    if ended is ReleaseReason.PEER_LOST:
        return Refused(f"{about} was given up: its reader was away for longer than resume_s", code="lost")
    return Refused(f"{about} was used before: a ticket is good for one read", code="replayed")
