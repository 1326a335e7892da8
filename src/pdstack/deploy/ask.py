"""Ask a frontend over HTTP as a client would, with the standard library alone.

The checks and the end-to-end tests use it: it keeps what a client sees (status, pieces of text, `[DONE]`, errors in
the middle of a stream) instead of turning it into exceptions. Facts of ai-dynamo 0.7.0 it rests on: `/v1/completions`
takes a list of token ids as the prompt and passes it on unchanged, and `x-dynamo-request-id` (a UUID) becomes the
request's id in every worker.
"""

from __future__ import annotations

import http.client
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 120.0
# As pdstack.worker.requests has it, which a controller does not import.
NO_PREFIX_CACHE = "pdstack:no-prefix-cache"


@dataclass
class Answer:
    """What came back for one request. Times are seconds since it was sent.

    `done` says that the stream ended with `[DONE]`; `error` is what the server said went wrong, or how the connection
    broke. A good answer has status 200, a finish reason, `done` and no error.
    """

    request_id: str
    status: int = 0
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    done: bool = False
    error: str = ""
    first_s: float | None = None
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)

    @property
    def good(self) -> bool:
        """Whether the stream is complete and without an error."""
        return self.status == 200 and self.done and bool(self.finish_reason) and not self.error

    def problem(self) -> str:
        """Return what is wrong with the answer in one line; empty if nothing is."""
        if self.good:
            return ""
        found = f"status {self.status}, finish_reason {self.finish_reason}, [DONE] {'seen' if self.done else 'missing'}"
        return f"request {self.request_id}: {found}, error: {self.error or 'none'}"


def connect(url: str, timeout_s: float) -> tuple[http.client.HTTPConnection, str]:
    """Return a connection to the server of a http:// URL, and its path with query; ValueError for other schemes."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"found the URL {url!r}, wanted http://HOST:PORT")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout_s), path


def get(url: str, timeout_s: float = 10.0) -> tuple[int, str]:
    """GET a URL; return status and body. OSError when there is no answer."""
    connection, path = connect(url, timeout_s)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    except http.client.HTTPException as error:
        raise OSError(f"{url}: {type(error).__name__} {error}") from error
    finally:
        connection.close()


def get_json(url: str, timeout_s: float = 10.0) -> Any:
    """GET a URL that must answer 200 with JSON; OSError when it does not, ValueError when it is not JSON."""
    status, body = get(url, timeout_s)
    if status != 200:
        raise OSError(f"{url}: found status {status}, wanted 200: {body[:300]}")
    return json.loads(body)


def events(lines: Iterator[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (field, value) of each line of a server-sent event stream; comments have the field ``comment``."""
    for raw in lines:
        line = raw.decode(errors="replace").rstrip("\r\n")
        if not line:
            continue
        name, colon, value = line.partition(":")
        yield (name or "comment") if colon else line, value.strip()


def read_stream(answer: Answer, lines: Iterator[bytes], started: float) -> None:
    """Fill `answer` from the lines of an event stream."""
    failed = False
    for name, value in events(lines):
        if name == "event" and value == "error":
            failed = True
        elif name == "comment" and failed:
            answer.error = answer.error or value
        elif name == "data" and value == "[DONE]":
            answer.done = True
        elif name == "data":
            _read_chunk(answer, json.loads(value), started)
    if failed and not answer.error:
        answer.error = "an error event without a text"


def _read_chunk(answer: Answer, chunk: dict[str, Any], started: float) -> None:
    if "choices" not in chunk:
        answer.error = json.dumps(chunk)[:500]
        return
    for choice in chunk["choices"]:
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        if text or choice.get("finish_reason"):
            answer.first_s = answer.first_s if answer.first_s is not None else time.monotonic() - started
        if text:
            answer.pieces.append(text)
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason


def post(url: str, body: dict[str, Any], timeout_s: float = TIMEOUT_S, request_id: str | None = None) -> Answer:
    """POST a streaming request and read it to its end. Never raises for what the server or the network does."""
    answer = Answer(request_id or str(uuid.uuid4()))
    started = time.monotonic()
    headers = {"Content-Type": "application/json", "x-dynamo-request-id": answer.request_id, "Connection": "close"}
    connection, path = connect(url, timeout_s)
    try:
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        answer.status = response.status
        if response.status == 200:
            read_stream(answer, iter(response.readline, b""), started)
        else:
            answer.error = response.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    answer.seconds = time.monotonic() - started
    return answer


def complete(
    frontend: str,
    model: str,
    token_ids: Sequence[int],
    max_tokens: int,
    *,
    ignore_eos: bool = True,
    prefix_cache: bool = True,
    timeout_s: float = TIMEOUT_S,
) -> Answer:
    """Ask for a greedy completion of `token_ids`, streamed; without `prefix_cache` all of it is computed and moved."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(token_ids),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": ignore_eos,
        "stream": True,
    }
    if not prefix_cache:
        body["nvext"] = {"annotations": [NO_PREFIX_CACHE]}
    return post(f"{frontend}/v1/completions", body, timeout_s)


def chat(frontend: str, model: str, text: str, max_tokens: int, timeout_s: float = TIMEOUT_S) -> Answer:
    """Send one message of a user, streamed, greedy."""
    messages = [{"role": "user", "content": text}]
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    return post(f"{frontend}/v1/chat/completions", body, timeout_s)
