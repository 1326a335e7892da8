"""Tickets: the permission to fetch one request's KV once. They travel in `disaggregated_params["kv_transfer_params"]`.

A ticket is a signed capability: which blocks in which generation, of which layout, in which direction, until when and
for whom. It opens nothing alone: the means to read memory are given only over an authenticated control connection, and
there prefill checks the ticket again. Whoever of its audience asks first is the one instance it is good for; that
instance, and no other, may ask again after a lost connection. The blocks' hashes and the first token are not in it,
because the prompt may still be being computed when it is issued: they come over the control connection.
"""

from __future__ import annotations

import hmac
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from pdstack.transfer.errors import TicketError
from pdstack.transfer.keys import ClusterKey

VERSION = 2
# The only way that KV moves.
DIRECTION = "prefill>decode"
MAX_BLOCKS = 1 << 16
MAX_TEXT = 512


@dataclass(frozen=True)
class Ticket:
    """One export. Times are seconds since the epoch, for people: prefill judges the deadline by a monotonic clock."""

    request_id: str
    worker: str
    incarnation: str
    host: str
    port: int
    backend: str
    direction: str
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    tokens: int
    layout: str
    audience: str
    issued_at: float
    expires_at: float
    nonce: str
    mac: str = ""
    version: int = VERSION

    def to_wire(self) -> dict[str, Any]:
        """A JSON-able dict; :meth:`from_wire` reads it back."""
        wire: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        wire["blocks"], wire["generations"] = list(self.blocks), list(self.generations)
        return wire

    @classmethod
    def from_wire(cls, wire: object) -> Ticket:
        """Read a ticket that came over the network. Raises :class:`TicketError` (code ``malformed`` or ``version``).

        The MAC is not checked here; :func:`verify` does that.
        """
        if not isinstance(wire, Mapping):
            raise _malformed(f"it is {type(wire).__name__}, wanted an object")
        known = {field.name: str(field.type) for field in fields(cls)}
        if wire.get("version") != VERSION:
            raise TicketError(
                f"ticket version {_show(wire.get('version'))}, wanted {VERSION}: run one pdstack everywhere",
                code="version",
            )
        if unknown := sorted(str(key) for key in wire.keys() - known.keys()):
            raise _malformed(f"unknown fields {_show(unknown)}")
        if missing := sorted(known.keys() - wire.keys()):
            raise _malformed(f"fields missing: {', '.join(missing)}")
        values: dict[str, Any] = {}
        for name, kind in known.items():
            values[name] = _CHECKS[kind](name, wire[name])
        ticket = cls(**values)
        if len(ticket.generations) != len(ticket.blocks):
            raise _malformed(f"{len(ticket.blocks)} blocks and {len(ticket.generations)} generations")
        return ticket

    def signed(self, key: ClusterKey) -> Ticket:
        """The same ticket with its MAC."""
        return replace(self, mac=_mac(self, key))


def new_nonce() -> str:
    """128 random bits as hex: no two tickets are equal, even for one request."""
    return secrets.token_hex(16)


def verify(ticket: Ticket, key: ClusterKey, *, audience: str) -> None:
    """Check what either end can check alone: MAC, direction, audience. Raises :class:`TicketError`."""
    if not hmac.compare_digest(ticket.mac.encode(), _mac(ticket, key).encode()):
        raise TicketError(
            f"ticket of request {_show(ticket.request_id)} is not signed with this cluster's key: it is forged, "
            "altered, or the workers have different keys",
            code="forged",
        )
    if ticket.direction != DIRECTION:
        raise TicketError(
            f"ticket of request {_show(ticket.request_id)} is for {_show(ticket.direction)}, wanted {DIRECTION!r}",
            code="direction",
        )
    if ticket.audience != audience:
        raise TicketError(
            f"ticket of request {_show(ticket.request_id)} is for {_show(ticket.audience)}, "
            f"this worker is {audience!r}",
            code="audience",
        )


def issue(
    key: ClusterKey,
    *,
    ttl_s: float,
    **values: Any,
) -> Ticket:
    """A signed ticket that is valid for `ttl_s` seconds from now; `values` are the fields of :class:`Ticket`."""
    # Whole milliseconds: the router parses and prints the ticket as JSON, and its parser (serde_json) changes the last
    # bit of numbers with more than 15 digits now and then. The MAC would then not match any more.
    now = round(time.time(), 3)
    return Ticket(
        issued_at=now, expires_at=round(now + ttl_s, 3), nonce=new_nonce(), direction=DIRECTION, **values
    ).signed(key)


def _mac(ticket: Ticket, key: ClusterKey) -> str:
    wire = ticket.to_wire()
    del wire["mac"]
    text = json.dumps(wire, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hmac.digest(key.derive("ticket"), text.encode(), "sha256").hex()


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _malformed(why: str) -> TicketError:
    return TicketError(f"this is not a KV ticket: {why}", code="malformed")


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise _malformed(f"{name} is {_show(value)}, wanted text of at most {MAX_TEXT} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _malformed(f"{name} is not valid Unicode text") from None
    return value


def _whole(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
        raise _malformed(f"{name} is {_show(value)}, wanted a whole number from 0 to 2**53")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise _malformed(f"{name} is {_show(value)}, wanted seconds since the epoch")
    return float(value)


def _numbers(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_BLOCKS:
        raise _malformed(f"{name} is {_show(value)}, wanted 1 to {MAX_BLOCKS} block numbers")
    if set(map(type, value)) == {int} and min(value) >= 0 and max(value) < 1 << 53:
        return tuple(value)  # as nearly always, without a call for each of thousands
    return tuple(_whole(name, item) for item in value)


_CHECKS: dict[str, Any] = {"str": _text, "int": _whole, "float": _number, "tuple[int, ...]": _numbers}
