from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pdstack.worker.coordination import NotUsable, check_etcd, check_nats, until


@asynccontextmanager
async def saying(text: bytes) -> AsyncIterator[str]:
    """A server that says `text` to everybody."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(text)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


ETCD_GOOD = b'HTTP/1.0 200 OK\r\n\r\n{"health":"true"}'
ETCD_BAD = b'HTTP/1.0 503 x\r\n\r\n{"health":"false","reason":"NO LEADER"}'


def test_etcd() -> None:
    async def scenario() -> None:
        async with saying(ETCD_GOOD) as good, saying(ETCD_BAD) as bad:
            await check_etcd([f"http://{bad}", f"http://{good}"])
            with pytest.raises(NotUsable, match=r"not healthy.*NO LEADER"):
                await check_etcd([f"http://{bad}"])
        with pytest.raises(NotUsable, match=r"http://127.0.0.1:\d+: .*is etcd_endpoints right"):
            await check_etcd([f"http://{good}"])

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("greeting", "message"),
    [
        (b'INFO {"server_id":"x","jetstream":true}\r\n', None),
        (b'INFO {"server_id":"x"}\r\n', "without JetStream"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "wanted a NATS greeting"),
        (b"", "wanted a NATS greeting"),
    ],
)
def test_nats(greeting: bytes, message: str | None) -> None:
    async def scenario() -> None:
        async with saying(greeting) as address:
            await check_nats(f"nats://{address}")

    if message is None:
        asyncio.run(scenario())
    else:
        with pytest.raises(NotUsable, match=message):
            asyncio.run(scenario())


def test_until_repeats_and_reports() -> None:
    reports: list[str] = []

    async def check() -> None:
        if len(reports) < 2:
            raise NotUsable(f"attempt {len(reports)}")

    asyncio.run(until(check, reports.append))
    assert reports == ["attempt 0", "attempt 1"]
