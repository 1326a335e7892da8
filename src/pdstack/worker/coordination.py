"""Find out whether etcd and NATS can be used, before Dynamo's runtime is created.

Dynamo 0.7 does not retry, and hides why it failed behind a Rust panic; these probes retry and say the reason.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

PROBE_TIMEOUT_S = 3.0
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 3.0


class NotUsable(Exception):
    """A coordination service cannot be used; the text says what was asked, what was found and what to do."""


async def check_etcd(endpoints: Sequence[str]) -> None:
    """Succeed if one of the endpoints answers and is healthy (over https: if it accepts a connection)."""
    problems = []
    for endpoint in endpoints:
        try:
            await asyncio.wait_for(_check_etcd_endpoint(endpoint), PROBE_TIMEOUT_S)
        except (OSError, NotUsable, TimeoutError) as error:
            problems.append(f"{endpoint}: {describe(error)}")
        else:
            return
    raise NotUsable(f"etcd does not answer ({'; '.join(problems)}); is it running, and is etcd_endpoints right?")


async def check_nats(server: str) -> None:
    """Succeed if the server greets as NATS does and has JetStream, without which Dynamo cannot start."""
    try:
        await asyncio.wait_for(_check_nats(server), PROBE_TIMEOUT_S)
    except (OSError, NotUsable, TimeoutError) as error:
        text = f"NATS is not usable ({server}: {describe(error)}); is it running, and is nats_server right?"
        raise NotUsable(text) from None


async def until(check: Callable[[], Awaitable[None]], report: Callable[[str], None]) -> None:
    """Repeat `check` with growing pauses until it succeeds; `report` gets the text of every failure."""
    pause = FIRST_PAUSE_S
    while True:
        try:
            return await check()
        except NotUsable as error:
            report(str(error))
        await asyncio.sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE_S)


def describe(error: BaseException) -> str:
    """Say in words what went wrong; some exceptions have no text of their own."""
    if isinstance(error, TimeoutError):
        return f"no answer within {PROBE_TIMEOUT_S:g} s"
    return str(error) or type(error).__name__


async def _check_etcd_endpoint(endpoint: str) -> None:
    url = urlsplit(endpoint)
    reader, writer = await asyncio.open_connection(url.hostname, url.port or 2379)
    try:
        if url.scheme == "https":
            return  # the health page asks for a client certificate; the runtime checks that itself
        writer.write(f"GET /health HTTP/1.0\r\nHost: {url.netloc}\r\n\r\n".encode())
        answer = await reader.read(4096)
        if b'"health":"true"' not in answer:
            body = answer.partition(b"\r\n\r\n")[2] or answer
            raise NotUsable(f"not healthy, /health says {body[:200].decode(errors='replace')!r}")
    finally:
        writer.close()


async def _check_nats(server: str) -> None:
    url = urlsplit(server)
    reader, writer = await asyncio.open_connection(url.hostname, url.port or 4222)
    try:
        line = await reader.readline()
        if not line.startswith(b"INFO "):
            raise NotUsable(f"wanted a NATS greeting, found {line[:80]!r}")
        if not json.loads(line[5:]).get("jetstream"):
            raise NotUsable("the server runs without JetStream; start it with -js or a jetstream section")
    finally:
        writer.close()
