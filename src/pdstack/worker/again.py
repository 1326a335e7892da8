"""Asking prefill once more, when the KV of a prompt is gone or its prefill worker is lost.

The decode worker asks prefill itself, past the frontend. Measured with Dynamo 0.7.0.post1 and the alternative, a stream
that decode breaks off (a generator that raises GeneratorExit; any other exception goes to the client as an error):
Dynamo does send the request through prefill again, but it takes the decode worker for dead and sends it nothing more
until something in etcd changes. With one decode worker the client, and all after it, get an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pdstack.transfer import PeerUnreachable, ReadFailed, ReadTimeout, TransferError

# Carried beside the ticket: Dynamo's number of the prefill worker that issued it. A hint, not signed.
INSTANCE = "prefill_instance"

# The worker may be well, but has not this KV (any more); or the prefix that decode held was not what prefill computes.
GONE = frozenset({"prefill_failed", "unknown", "expired", "lost", "withdrawn", "generation", "prefix"})
# A read that failed for these would fail again at any worker, or has to be heard of: wrong bytes, a right missing.
LOUD = frozenset({"checksum", "not_permitted"})


def is_lost(error: TransferError) -> bool:
    """True if the worker does not answer or does not come on: another is asked if there is one, or comes up in time."""
    if isinstance(error, PeerUnreachable | ReadFailed | ReadTimeout):
        return error.code not in LOUD
    return error.code in ("prefill_stalled", "incarnation")


class AskAgainFailed(Exception):
    """No prefill worker took the prompt; the text says why."""


class Prefill(Protocol):
    """The prefill workers of this deployment."""

    async def ask(self, request: Mapping[str, Any], request_id: str, avoid: Collection[int]) -> Mapping[str, Any]:
        """Have a prompt prefilled; the answer is the item that a frontend would get.

        Instances in `avoid` are asked only if for a while there is no other. Raises AskAgainFailed.
        """


@dataclass
class Attempts:
    """How often KV has been lost for one request, and where."""

    limit: int
    made: int = 0
    avoid: set[int] = field(default_factory=set)

    def another(self, error: TransferError, instance: int | None) -> bool:
        """Count a loss; True if prefill should be asked again, False if the error is of another kind or it is enough.

        `instance` is the worker whose KV was lost, None if unknown.
        """
        lost = is_lost(error)
        if not (lost or error.code in GONE) or self.made >= self.limit:
            return False
        self.made += 1
        if lost and instance is not None:
            self.avoid.add(instance)
        return True


def prefill_request(request: Mapping[str, Any], parameters: str) -> dict[str, Any]:
    """What Dynamo's router sends to prefill for `request`: without decode's `parameters`, and for one token."""
    asked = {name: value for name, value in request.items() if name != parameters}
    asked["stop_conditions"] = {**(request.get("stop_conditions") or {}), "max_tokens": 1}
    return asked
