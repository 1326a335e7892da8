"""What decode knows of one prompt's KV while it comes: which blocks are final at prefill, and which are here."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from pdstack.transfer.errors import ProtocolError
from pdstack.transfer.store import Hashes
from pdstack.transfer.ticket import Ticket
from pdstack.transfer.wire import Message

_MAX_TOKEN = 1 << 53


class Incoming:
    """One fetch. It outlives a lost connection: what was verified stays verified, because its hash is prefill's.

    `held` leading local blocks are in decode's pool already; `compared` of prefill's are compared with them, not moved.
    """

    def __init__(self, ticket: Ticket, local: Sequence[int], held: int) -> None:
        if len(set(local)) != len(local):
            raise ValueError("a local block is named twice: two reads would write the same memory")
        if not 0 <= held <= len(local):
            raise ValueError(f"{held} of {len(local)} blocks are said to be held")
        self.ticket, self.local, self.held = ticket, tuple(local), held
        self.compared = 0
        self.hashes: list[int] = []
        self.first_token: int | None = None
        self.failure: str | None = None
        self.changed = asyncio.Event()
        self._verified = [False] * len(ticket.blocks)
        self._tokens = (1, 1)

    def fit(self, remote_tokens: int, local_tokens: int) -> None:
        """So many tokens are in a block of prefill's and of decode's. Raises ValueError if the blocks are too few.

        Where the numbers differ, blocks that decode holds cannot be compared one by one, so all of them move; they are
        not written all the same.
        """
        self._tokens = (remote_tokens, local_tokens)
        remote, local, tokens = len(self.ticket.blocks), len(self.local), self.ticket.tokens
        if remote_tokens == local_tokens and remote != local:
            raise ValueError(f"{remote} remote blocks for {local} local blocks, wanted equal numbers")
        if remote * remote_tokens < tokens or local * local_tokens < tokens:
            raise ValueError(
                f"{tokens} tokens do not fit {remote} remote blocks of {remote_tokens} and {local} local blocks of "
                f"{local_tokens}"
            )
        self.compared = self.held if remote_tokens == local_tokens else 0

    def take(self, message: Message, who: str) -> None:
        """A frame "ready", "computed" or "failed" from prefill. Raises :class:`ProtocolError`."""
        match message["type"]:
            case "ready":
                hashes, first = message.get("hashes"), message.get("first")
                if first != len(self.hashes) or not isinstance(hashes, list) or not _are_hashes(hashes):
                    raise ProtocolError(f"{who} announced blocks that do not follow those it announced before")
                if len(self.hashes) + len(hashes) > len(self.ticket.blocks):
                    raise ProtocolError(f"{who} announced more blocks than the ticket has")
                self.hashes += hashes
            case "computed":
                token = message.get("first_token")
                whole = isinstance(token, int) and not isinstance(token, bool) and 0 <= token < _MAX_TOKEN
                if not whole or len(self.hashes) < len(self.ticket.blocks):
                    raise ProtocolError(f"{who} ended a prompt with token {token!r:.20} and blocks missing")
                self.first_token = token
            case _:
                self.failure = f"{message.get('reason')!s:.300}"
        self.changed.set()

    def waiting(self) -> list[int]:
        """Places of blocks that are final at prefill and not yet verified here."""
        return [place for place, _ in enumerate(self.hashes) if not self._verified[place]]

    def compare(self, places: Sequence[int], found: Hashes) -> list[int]:
        """Mark the blocks at `places` verified whose hash is prefill's; returns the places of the others."""
        right = set(self.right(places, found))
        for place in right:
            self._verified[place] = True
        return [place for place in places if place not in right]

    def right(self, places: Sequence[int], found: Hashes) -> list[int]:
        """Those of `places` whose hash is prefill's."""
        return [place for place, value in zip(places, found.tolist(), strict=True) if value == self.hashes[place]]

    @property
    def verified(self) -> int:
        """So many leading blocks of prefill's are here."""
        return next((place for place, done in enumerate(self._verified) if not done), len(self._verified))

    @property
    def verified_local(self) -> int:
        """So many leading local blocks hold prefill's bytes."""
        verified, (remote, local) = self.verified, self._tokens
        return len(self.local) if verified == len(self._verified) else min(verified * remote // local, len(self.local))

    @property
    def complete(self) -> bool:
        """True if the first token is known and every block is verified."""
        return self.first_token is not None and all(self._verified)


def _are_hashes(values: list[Any]) -> bool:
    return set(map(type, values)) <= {int} and min(values, default=0) >= 0 and max(values, default=0) < 1 << 64
