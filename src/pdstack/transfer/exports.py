"""Prefill's book of exports: who may read what, and when blocks may be reused. A state machine, without I/O.

An export is *offered* until its deadline. A reader that asks in time gets it *granted*, once; from then on the deadline
means nothing and only the reader's word, or the loss of the reader's connection, ends it. A granted export is never
released for any other reason, so blocks are not reused under a running read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from pdstack.transfer.errors import Refused, TransferError
from pdstack.transfer.roles import ReleaseReason
from pdstack.transfer.ticket import Ticket

# So many ended exports are remembered, to tell "expired" and "replayed" from "unknown".
_REMEMBERED = 4096

OnRelease = Callable[[str, ReleaseReason], None]


@dataclass
class Export:
    """One export that is held."""

    ticket: Ticket
    deadline: float
    on_release: OnRelease
    holder: object | None = None


class ExportBook:
    """All exports of one prefill agent. `now` is a monotonic clock in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._held: dict[str, Export] = {}
        self._by_request: dict[str, str] = {}
        self._ended: OrderedDict[str, ReleaseReason] = OrderedDict()

    def counts(self) -> tuple[int, int]:
        """(offered, granted)."""
        granted = sum(export.holder is not None for export in self._held.values())
        return len(self._held) - granted, granted

    def check_new(self, request_id: str) -> None:
        """Raise :class:`TransferError` if `request_id` is exported now."""
        if request_id in self._by_request:
            raise TransferError(
                f"request {request_id!r} is exported already: withdraw it first, or use one id per prefill attempt",
                code="duplicate",
            )

    def offer(self, ticket: Ticket, ttl_s: float, on_release: OnRelease) -> None:
        """Hold an export until it is read, or for `ttl_s` seconds if nobody asks."""
        self.check_new(ticket.request_id)
        self._held[ticket.nonce] = Export(ticket, self._now() + ttl_s, on_release)
        self._by_request[ticket.request_id] = ticket.nonce

    def grant(self, ticket: Ticket, holder: object) -> Export:
        """Let `holder` read. Raises :class:`Refused` with code expired, replayed, withdrawn, unknown or altered."""
        self.expire()
        export = self._held.get(ticket.nonce)
        if export is None:
            raise _refusal(ticket, self._ended.get(ticket.nonce))
        if export.ticket != ticket:
            raise Refused(f"ticket of request {ticket.request_id!r} is not the one that was issued", code="altered")
        if export.holder is not None:
            raise _refusal(ticket, ReleaseReason.READ)
        export.holder = holder
        return export

    def finish(self, nonce: str, holder: object, ok: bool) -> Ticket | None:
        """The holder's read has ended; None if it holds no such export."""
        export = self._held.get(nonce)
        if export is None or export.holder is not holder:
            return None
        self._release(export, ReleaseReason.READ if ok else ReleaseReason.FAILED)
        return export.ticket

    def discard(self, ticket: Ticket, holder: object) -> bool:
        """The reader does not need the export; False if it is not held, or held by another reader."""
        export = self._held.get(ticket.nonce)
        if export is None or export.ticket != ticket or export.holder not in (None, holder):
            return False
        self._release(export, ReleaseReason.DISCARDED)
        return True

    def withdraw(self, request_id: str) -> bool:
        """Take an offer back; False if there is none, or if a reader has it (then its end releases it)."""
        export = self._held.get(self._by_request.get(request_id, ""))
        if export is None or export.holder is not None:
            return False
        self._release(export, ReleaseReason.WITHDRAWN)
        return True

    def lost(self, holder: object) -> None:
        """The connection of `holder` is gone. Its reads may run on, but it will report them as failed."""
        for export in [export for export in self._held.values() if export.holder is holder]:
            self._release(export, ReleaseReason.PEER_LOST)

    def expire(self) -> float | None:
        """Release offers past their deadline; the seconds until the next deadline, None if there is none."""
        now = self._now()
        offered = [export for export in self._held.values() if export.holder is None]
        for export in offered:
            if export.deadline <= now:
                self._release(export, ReleaseReason.EXPIRED)
        return min((export.deadline - now for export in offered if export.deadline > now), default=None)

    def close(self) -> None:
        """Release everything. The pool must not be readable any more."""
        for export in list(self._held.values()):
            self._release(export, ReleaseReason.CLOSED)

    def _release(self, export: Export, reason: ReleaseReason) -> None:
        nonce = export.ticket.nonce
        del self._held[nonce]
        del self._by_request[export.ticket.request_id]
        self._ended[nonce] = reason
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
        export.on_release(export.ticket.request_id, reason)


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
    return Refused(f"{about} was used before: a ticket is good for one read", code="replayed")
