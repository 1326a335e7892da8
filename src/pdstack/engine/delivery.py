"""How results get from the engine's thread to the coroutines that wait for them in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import NamedTuple

from pdstack.engine.config import EngineError, FinishReason, Step

__all__ = ["Client", "Item", "Progress", "deliver", "steps_of"]


class Progress(NamedTuple):
    """So many leading blocks of a prompt are final."""

    ready: int


# What reaches a waiting coroutine: a token, the end (its reason), an error, or how far a prompt is.
Item = int | FinishReason | EngineError | Progress


class Client:
    """A sequence's side in the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.items: asyncio.Queue[Item] = asyncio.Queue()
        self.admitted: asyncio.Future[None] = loop.create_future()


def deliver(outbox: list[tuple[Client, list[Item]]]) -> None:
    """In the event loop: hand items to their clients. The first delivery of a client says that it was admitted."""
    for client, items in outbox:
        if not client.admitted.done():
            if items and isinstance(items[0], EngineError):
                client.admitted.set_exception(items[0])
                continue
            client.admitted.set_result(None)
        for item in items:
            client.items.put_nowait(item)


async def steps_of(client: Client) -> AsyncIterator[Step]:
    """The tokens of a client, those that are there together in one step; raises the error that ends them."""
    while True:
        step = Step([])
        item: Item | None = await client.items.get()
        while item is not None:
            if isinstance(item, EngineError):
                raise item
            if isinstance(item, str):
                step.finish_reason = item
                break
            assert isinstance(item, int), "only the blocks of a prompt that is shipped are reported on"
            step.token_ids.append(item)
            item = None if client.items.empty() else client.items.get_nowait()
        yield step
        if step.finish_reason is not None:
            return
