"""What `generate_async` gives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class CompletionOutput:
    """All tokens of a request so far."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    disaggregated_params: Any = None


class GenerationResult:
    """Iterate over it: after each step it holds the tokens so far."""

    def __init__(self, request_id: int, loop: asyncio.AbstractEventLoop, abort: Callable[[], None]) -> None:
        self.request_id = request_id
        self.outputs = [CompletionOutput()]
        self.finished = False
        self.metrics_dict: dict[Any, float] = {}
        self._loop = loop
        self._abort = abort
        self._items: asyncio.Queue[tuple[list[int], str | None, Any] | Exception] = asyncio.Queue()

    def put(self, item: tuple[list[int], str | None, Any] | Exception) -> None:
        """Take (tokens, finish reason, disaggregated parameters) or an error; from any thread."""
        self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    def abort(self) -> None:
        """Stop the request."""
        self._abort()

    def __aiter__(self) -> GenerationResult:
        return self

    async def __anext__(self) -> GenerationResult:
        if self.finished:
            raise StopAsyncIteration
        item = await self._items.get()
        if isinstance(item, Exception):
            self.finished = True
            raise item
        tokens, reason, parameters = item
        output = self.outputs[0]
        output.token_ids = [*output.token_ids, *tokens]
        output.finish_reason, output.disaggregated_params = reason, parameters
        self.finished = reason is not None
        return self
