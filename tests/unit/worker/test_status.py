from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pdstack import probe
from pdstack.worker.finished import FinishedRequests
from pdstack.worker.status import Answer, StatusServer, json_answer


def broken(_: str) -> Answer:
    raise RuntimeError("out of ideas")


def server() -> StatusServer:
    return StatusServer(
        {
            "health": lambda _: json_answer(503, {"problems": ["loading the model"]}),
            "ok": lambda rest: json_answer(200, {"rest": rest}),
            "broken": broken,
        }
    )


@pytest.mark.parametrize(
    ("head", "status", "text"),
    [
        (b"GET /ok/a/b?x=1 HTTP/1.1\r\n\r\n", 200, '"rest": "a/b"'),
        (b"GET /ok/a%20b HTTP/1.0\r\n\r\n", 200, '"rest": "a b"'),
        (b"GET /health HTTP/1.1\r\n\r\n", 503, "loading the model"),
        (b"GET /nothing HTTP/1.1\r\n\r\n", 404, "known: /health, /ok, /broken"),
        (b"POST /ok HTTP/1.1\r\n\r\n", 405, "only GET"),
        (b"hello\r\n\r\n", 400, "not an HTTP request"),
        (b"GET /broken HTTP/1.1\r\n\r\n", 500, "out of ideas"),
    ],
)
def test_answers(head: bytes, status: int, text: str) -> None:
    answer = server().answer(head)
    assert answer.status == status
    assert text in answer.body.decode()
    json.loads(answer.body)


@asynccontextmanager
async def listening() -> AsyncIterator[str]:
    status = server()
    await status.start("127.0.0.1", 0)
    assert status._server is not None
    yield f"127.0.0.1:{status._server.sockets[0].getsockname()[1]}"
    await status.close()


async def run_probe(*words: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-S", "-E", probe.__file__, *words, stderr=asyncio.subprocess.PIPE
    )
    _, text = await process.communicate()
    assert process.returncode is not None
    return process.returncode, text.decode()


def test_probe_against_a_real_server() -> None:
    async def scenario() -> list[tuple[int, str]]:
        async with listening() as address:
            found = [
                await run_probe("http", f"http://{address}/ok"),
                await run_probe("http", f"http://{address}/health"),
                await run_probe("tcp", address),
            ]
        found += [await run_probe("tcp", address), await run_probe("http", f"http://{address}/ok")]
        return found

    good, unhealthy, tcp, closed_tcp, closed_http = asyncio.run(scenario())
    assert good == (0, "")
    assert unhealthy[0] == 1
    assert "503" in unhealthy[1]
    assert "loading the model" in unhealthy[1]
    assert tcp == (0, "")
    assert closed_tcp[0] == 1
    assert "refused" in closed_tcp[1]
    assert closed_http[0] == 1


@pytest.mark.parametrize(
    "words", [[], ["http"], ["udp", "x:1"], ["tcp", "x:1", "--timeout"], ["tcp", "x:1", "--timeout", "soon"]]
)
def test_probe_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(words) == 2
    assert "usage" in capsys.readouterr().err


def test_probe_addresses() -> None:
    assert probe.split_address("[::1]:80") == ("::1", 80)
    assert probe.split_address("host", 80) == ("host", 80)
    for wrong in ("host", "host:http"):
        with pytest.raises(ValueError, match="wanted"):
            probe.split_address(wrong)


def test_slow_and_oversized_clients_do_not_hurt() -> None:
    async def scenario() -> Any:
        async with listening() as address:
            host, _, port = address.partition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /ok HTTP/1.1\r\n" + b"X: y\r\n" * 10000)
            assert await reader.read() == b""
            writer.close()
            return await run_probe("http", f"http://{address}/ok")

    assert asyncio.run(scenario()) == (0, "")


def test_only_the_last_finished_requests_are_kept() -> None:
    finished = FinishedRequests(kept=2)
    for number in range(3):
        finished.add(str(number), {"n": number})
    finished.add("1", {"n": "again"})
    finished.add("3", {"n": 3})
    assert finished.get("0") is None
    assert finished.get("2") is None
    assert finished.get("1") == {"n": "again"}
    assert finished.get("3") == {"n": 3}
