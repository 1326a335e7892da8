"""What prefill says of a prompt that comes, and what decode makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tickets import json_values, make

from pdstack.transfer import ProtocolError
from pdstack.transfer.incoming import Incoming

VALUES = {"request_id": "r", "worker": "w", "incarnation": "i", "host": "h", "port": 1, "backend": "ucx", "tokens": 9}
TICKET = make({**VALUES, "blocks": (1, 2, 3), "generations": (0, 0, 0)})


def ready(first: int, *hashes: int) -> dict[str, Any]:
    return {"type": "ready", "first": first, "hashes": list(hashes)}


def test_blocks_come_in_order_and_are_verified_by_their_hash() -> None:
    incoming = Incoming(TICKET, [7, 8, 9], 0)
    incoming.take(ready(0, 10), "p")
    assert (incoming.waiting(), incoming.changed.is_set()) == ([0], True)
    incoming.take(ready(1, 11, 12), "p")
    assert incoming.compare([0, 2], np.array([10, 99], np.uint64)) == [2]
    assert (incoming.waiting(), incoming.verified, incoming.complete) == ([1, 2], 1, False)
    incoming.take({"type": "computed", "first_token": 5}, "p")
    assert incoming.compare([1, 2], np.array([11, 12], np.uint64)) == []
    assert (incoming.complete, incoming.verified, incoming.first_token) == (True, 3, 5)


WRONG: list[Callable[[Incoming], None]] = [
    lambda incoming: incoming.take(ready(1, 10), "p"),
    lambda incoming: incoming.take(ready(0, 1, 2, 3, 4), "p"),
    lambda incoming: incoming.take(ready(0, -1), "p"),
    lambda incoming: incoming.take(ready(0, 1 << 64), "p"),
    lambda incoming: incoming.take({"type": "ready", "first": 0, "hashes": [True]}, "p"),
    lambda incoming: incoming.take({"type": "ready", "first": 0}, "p"),
    lambda incoming: incoming.take({"type": "computed", "first_token": 1}, "p"),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_follow_is_refused(wrong: Callable[[Incoming], None]) -> None:
    with pytest.raises(ProtocolError, match="p "):
        wrong(Incoming(TICKET, [7, 8, 9], 0))


@given(
    st.sampled_from(["ready", "computed", "failed"]),
    st.dictionaries(st.sampled_from(["first", "hashes", "first_token", "reason"]), json_values),
)
def test_any_frame_is_taken_or_refused(kind: str, values: dict[str, Any]) -> None:
    incoming = Incoming(TICKET, [7, 8, 9], 0)
    try:
        incoming.take({**values, "type": kind}, "p")
    except ProtocolError:
        assert not incoming.hashes
        assert incoming.first_token is None


@pytest.mark.parametrize(
    ("local", "held", "sizes"),
    [
        ([1], 0, (3, 3)),
        ([1, 1, 2], 0, (3, 3)),
        ([1, 2, 3], 4, (3, 3)),
        ([1, 2, 3], -1, (3, 3)),
        ([1, 2, 3], 0, (2, 2)),
        ([1, 2, 3], 0, (3, 2)),
        ([1, 2], 0, (2, 8)),
    ],
)
def test_impossible_fetches_are_refused(local: list[int], held: int, sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"blocks|block is named"):
        Incoming(TICKET, local, held).fit(*sizes)


def test_verified_blocks_are_counted_in_decodes_own() -> None:
    incoming = Incoming(TICKET, [7, 8], 0)
    incoming.fit(4, 6)
    incoming.take(ready(0, 10, 11, 12), "p")
    found = []
    for place in range(3):
        incoming.compare([place], np.array([10 + place], np.uint64))
        found.append(incoming.verified_local)
    assert found == [0, 1, 2]
    incoming = Incoming(TICKET, [7, 8, 9], 1)
    incoming.fit(3, 3)
    assert incoming.compared == 1


def test_it_can_be_waited_for() -> None:
    async def body() -> None:
        incoming = Incoming(TICKET, [7, 8, 9], 0)
        waiting = asyncio.create_task(incoming.changed.wait())
        await asyncio.sleep(0)
        incoming.take({"type": "failed", "reason": "x" * 1000}, "p")
        await waiting
        assert incoming.failure == "x" * 300

    asyncio.run(body())
