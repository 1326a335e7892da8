"""A small HTTP server for health, metrics and inspection.

    GET /health                200 if this worker can serve, else 503 with the reasons
    GET /metrics               Prometheus text
    GET /transfer              the transfer agent's own counters, JSON
    GET /audit                 the last records of the transfer's audit log, oldest first, JSON
    GET /requests/REQUEST_ID   tokens and timings of one of the last finished requests, JSON

Only GET, one request per connection. Written on asyncio streams: the worker has an event loop and needs no framework.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 5.0
LONGEST_HEAD = 16384
REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 500: "Internal Server Error"}
REASONS[503] = "Service Unavailable"
JSON_TYPE = "application/json"


@dataclass(frozen=True)
class Answer:
    """An HTTP answer; `body` is sent as it is."""

    status: int
    body: bytes
    content_type: str = JSON_TYPE


def json_answer(status: int, data: Any) -> Answer:
    """Make an answer out of anything that JSON can hold."""
    return Answer(status, json.dumps(data).encode() + b"\n")


Route = Callable[[str], Answer]


class StatusServer:
    """Serves `routes`: the first part of the path chooses the function, which gets the rest of the path."""

    def __init__(self, routes: dict[str, Route]) -> None:
        self._routes = routes
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises OSError if the port is taken."""
        self._server = await asyncio.start_server(self._serve, host, port, limit=LONGEST_HEAD)

    async def close(self) -> None:
        """Stop listening; answers under way are finished."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                answer = self.answer(head)
                headers = [
                    f"HTTP/1.1 {answer.status} {REASONS[answer.status]}",
                    f"Content-Type: {answer.content_type}",
                    f"Content-Length: {len(answer.body)}",
                    "Connection: close",
                ]
                writer.write("\r\n".join(headers).encode() + b"\r\n\r\n" + answer.body)
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client went away, was too slow or sent too much: nobody to answer
        finally:
            writer.close()

    def answer(self, head: bytes) -> Answer:
        """Answer one request head (request line and headers)."""
        words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        if len(words) != 3:
            return json_answer(400, {"error": "not an HTTP request line"})
        method, target, _ = words
        if method != "GET":
            return json_answer(405, {"error": f"{method} is not answered here, only GET"})
        name, _, rest = unquote(urlsplit(target).path).lstrip("/").partition("/")
        route = self._routes.get(name)
        if route is None:
            return json_answer(404, {"error": f"unknown path; known: {', '.join('/' + r for r in self._routes)}"})
        try:
            return route(rest)
        except Exception as error:
            log.exception("status page /%s failed", name)
            return json_answer(500, {"error": f"{type(error).__name__}: {error}"})
