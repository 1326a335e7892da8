from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pdstack.deploy import ask


@contextmanager
def server(status: int, body: bytes, cut: bool = False) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that gives one answer; `cut` announces more bytes than it sends."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            seen.append({"id": self.headers["x-dynamo-request-id"], **json.loads(self.rfile.read(size))})
            self.do_GET()

        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + (1000 if cut else 0)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", seen
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def sse(*chunks: dict[str, Any] | str) -> bytes:
    return b"".join(
        f"{c}\n\n".encode() if isinstance(c, str) else f"data: {json.dumps(c)}\n\n".encode() for c in chunks
    )


def piece(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": finish}]}


def test_a_complete_stream_is_good() -> None:
    with server(200, sse(piece(" a"), piece(" b", "length"), "data: [DONE]")) as (url, seen):
        answer = ask.complete(url, "m", [1, 2], 2)
    assert answer.good
    assert answer.problem() == ""
    assert answer.text == " a b"
    assert answer.finish_reason == "length"
    assert answer.first_s is not None
    assert seen[0]["prompt"] == [1, 2]
    assert seen[0]["id"] == answer.request_id
    assert seen[0]["temperature"] == 0


def test_all_of_a_prompt_is_moved_if_asked_for() -> None:
    with server(200, sse(piece(" a", "length"), "data: [DONE]")) as (url, seen):
        ask.complete(url, "m", [1, 2], 2)
        ask.complete(url, "m", [1, 2], 2, prefix_cache=False)
    assert "nvext" not in seen[0]
    assert seen[1]["nvext"] == {"annotations": ["pdstack:no-prefix-cache"]}


def test_chat_pieces_are_read_from_the_delta() -> None:
    chunk = {"choices": [{"delta": {"content": "hi"}, "finish_reason": "stop"}]}
    with server(200, sse(chunk, "data: [DONE]")) as (url, _):
        assert ask.chat(url, "m", "x", 4).text == "hi"


def test_a_stream_that_just_ends_is_not_good() -> None:
    with server(200, sse(piece(" a"))) as (url, _):
        answer = ask.complete(url, "m", [1], 2)
    assert not answer.good
    assert "[DONE] missing" in answer.problem()


def test_an_error_event_is_kept_with_its_text() -> None:
    with server(200, sse(piece(" a"), "event: error\n: it broke", "data: [DONE]")) as (url, _):
        answer = ask.complete(url, "m", [1], 2)
    assert answer.error == "it broke"
    assert not answer.good


def test_a_refusal_is_kept_with_status_and_body() -> None:
    with server(500, b'{"message": "no instances"}') as (url, _):
        answer = ask.complete(url, "m", [1], 2)
    assert answer.status == 500
    assert "no instances" in answer.error


def test_nobody_listening_is_an_answer_and_no_exception() -> None:
    answer = ask.complete("http://127.0.0.1:9", "m", [1], 2, timeout_s=2)
    assert answer.status == 0
    assert "refused" in answer.error


def test_get_json_wants_200() -> None:
    with server(200, b'{"a": 1}') as (url, _):
        assert ask.get_json(url) == {"a": 1}
    with server(404, b"{}") as (url, _), pytest.raises(OSError, match="found status 404"):
        ask.get_json(url)


def test_other_schemes_are_refused() -> None:
    with pytest.raises(ValueError, match="wanted http"):
        ask.get("file:///etc/passwd")
