from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from pdstack.deploy import prove

Store = dict[str, str]


@pytest.fixture
def etcd() -> Iterator[Callable[..., str]]:
    """Starts pretended etcd members; `forgets` drops every write, `broken` answers 500."""
    servers: list[ThreadingHTTPServer] = []
    store: Store = {}

    def start(forgets: bool = False, broken: bool = False) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer: dict[str, Any] = {}
                if self.path.endswith("/put") and not forgets:
                    store[body["key"]] = body["value"]
                if self.path.endswith("/range") and not forgets and body["key"] in store:
                    answer = {"kvs": [{"key": body["key"], "value": store[body["key"]]}]}
                if self.path.endswith("/deleterange"):
                    store.pop(body["key"], None)
                self.send_response(500 if broken else 200)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    start.store = store  # type: ignore[attr-defined]  # lets a test see that nothing is left
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_etcd_is_proved_and_left_clean(etcd: Any) -> None:
    text = prove.prove_etcd([etcd(), etcd()])
    assert "2 of 2 members" in text
    assert etcd.store == {}


def test_a_member_that_forgets_is_found(etcd: Any) -> None:
    with pytest.raises(prove.Unproved, match="reads as"):
        prove.prove_etcd([etcd(), etcd(forgets=True)])
    assert etcd.store == {}


def test_an_error_of_etcd_is_told(etcd: Any) -> None:
    with pytest.raises(prove.Unproved, match="status 500"):
        prove.prove_etcd([etcd(broken=True)])


class FakeNats:
    """Speaks as much of NATS as the proof needs; `mode` says what is wrong with it."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"nats://127.0.0.1:{self.server.getsockname()[1]}"
        self.deleted = False
        Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        connection, _ = self.server.accept()
        stream = connection.makefile("rwb")
        stream.write(b"INFO {}\r\n" if self.mode != "http" else b"HTTP/1.1 400\r\n")
        stream.flush()
        message = b""
        while line := stream.readline():
            words = line.decode().split()
            if not words or words[0] != "PUB":
                continue
            payload = stream.read(int(words[3]) + 2)[:-2]
            reply: dict[str, Any] = {}
            if "MSG.GET" in words[1]:
                stored = b"other" if self.mode == "corrupt" else message
                reply = {"message": {"data": base64.b64encode(stored).decode()}}
            elif "DELETE" in words[1]:
                self.deleted = True
            elif not words[1].startswith("$JS"):
                message, reply = payload, {"seq": 1}
            if self.mode == "off":
                stream.write(f"HMSG {words[2]} 1 16 16\r\n".encode() + b"NATS/1.0 503\r\n\r\n" + b"\r\n")
            elif self.mode == "full" and "CREATE" in words[1]:
                data = json.dumps({"error": {"description": "insufficient storage"}}).encode()
                stream.write(f"PING\r\nMSG {words[2]} 1 {len(data)}\r\n".encode() + data + b"\r\n")
            else:
                data = json.dumps(reply).encode()
                stream.write(f"PING\r\nMSG {words[2]} 1 {len(data)}\r\n".encode() + data + b"\r\n")
            stream.flush()


def test_jetstream_is_proved_and_left_clean() -> None:
    server = FakeNats("good")
    assert "stored a message" in prove.prove_jetstream(server.url)
    assert server.deleted


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("off", "is JetStream off"),
        ("full", "insufficient storage"),
        ("corrupt", "reads as"),
        ("http", "does not greet"),
    ],
)
def test_what_is_wrong_with_nats_is_told(mode: str, says: str) -> None:
    with pytest.raises(prove.Unproved, match=says):
        prove.prove_jetstream(FakeNats(mode).url)


def test_the_proof_waits_for_a_service_that_comes_up() -> None:
    answers = iter([prove.Unproved("not yet"), prove.Unproved("not yet"), "proved"])

    def proof() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert prove.until(proof, 30) == "proved"


def test_nobody_listening_says_what_to_do_and_fails() -> None:
    source = Path(prove.__file__).read_text()
    result = subprocess.run(
        [sys.executable, "-I", "-", "etcd", "0", "http://127.0.0.1:9"],
        input=source, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert result.returncode == 1
    assert all(word in result.stderr for word in ("found:", "wanted:", "fix:", "no worker is started"))
