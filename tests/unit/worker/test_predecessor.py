from __future__ import annotations

import asyncio
import base64
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pdstack.worker.predecessor import key_of, replace


class Etcd:
    """Keys and leases behind etcd's JSON gateway, as far as it is used here."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.leases: set[int] = set()
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                data = json.dumps(outer.answer(self.path, body)).encode()
                self.send_response(outer.status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, body: dict[str, str]) -> dict[str, Any]:
        match path:
            case "/v3/kv/range":
                value = self.keys.get(body["key"])
                return {} if value is None else {"kvs": [{"key": body["key"], "value": value}], "count": "1"}
            case "/v3/kv/put":
                self.keys[body["key"]] = body["value"]
            case "/v3/lease/timetolive":
                return {"ID": body["ID"], "TTL": "7" if int(body["ID"]) in self.leases else "-1"}
            case "/v3/lease/revoke":
                self.leases.remove(int(body["ID"]))
        return {}

    def note(self) -> str:
        return base64.b64decode(self.keys[base64.b64encode(key_of("ns", "w").encode()).decode()]).decode()


@pytest.fixture
def etcd() -> Iterator[Etcd]:
    etcd = Etcd()
    thread = threading.Thread(target=etcd.server.serve_forever)
    thread.start()
    yield etcd
    etcd.server.shutdown()
    thread.join()
    etcd.server.server_close()


def test_the_lease_of_the_last_process_is_revoked(etcd: Etcd) -> None:
    etcd.leases = {0xA, 0xB, 0xC}
    asyncio.run(replace([etcd.url], "ns", "w", 0xA))
    assert etcd.note() == "a"
    assert etcd.leases == {0xA, 0xB, 0xC}
    asyncio.run(replace([etcd.url], "ns", "w", 0xB))
    assert etcd.note() == "b"
    assert etcd.leases == {0xB, 0xC}
    asyncio.run(replace([etcd.url], "ns", "w", 0xB))
    assert etcd.leases == {0xB, 0xC}, "a registration does not revoke itself"


def test_a_lease_that_is_gone_is_no_error(etcd: Etcd) -> None:
    asyncio.run(replace([etcd.url], "ns", "w", 0xA))
    asyncio.run(replace([etcd.url], "ns", "w", 0xB))
    assert etcd.note() == "b"


def test_failures_are_logged_and_not_raised(etcd: Etcd, caplog: pytest.LogCaptureFixture) -> None:
    etcd.status = 500
    with caplog.at_level(logging.WARNING):
        asyncio.run(replace([etcd.url], "ns", "w", 1))
        asyncio.run(replace(["http://127.0.0.1:9"], "ns", "w", 1))
    assert "wanted status 200, found 500" in caplog.text
    assert "refused" in caplog.text


def test_https_is_left_alone() -> None:
    asyncio.run(replace(["https://127.0.0.1:9"], "ns", "w", 1))
