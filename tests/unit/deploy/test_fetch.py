"""The real client of the Hugging Face hub against a hub of our own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "roles/model/files/fetch.py"
REPOSITORY = "owner/name"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"
FILES = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights", "original/x.pth": b"unwanted"}


class Hub(BaseHTTPRequestHandler):
    """One repository at one commit, for those who have the token."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        resolve = f"/{REPOSITORY}/resolve/{COMMIT}/"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, b"", {"X-Error-Code": "GatedRepo"}, body)
        elif path == f"/api/models/{REPOSITORY}/revision/{COMMIT}":
            siblings = [{"rfilename": name} for name in FILES]
            self.reply(200, json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode(), {}, body)
        elif path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(text), "oid": hashlib.sha1(text).hexdigest()}
                for name, text in FILES.items()
            ]
            self.reply(200, json.dumps(tree).encode(), {}, body)
        elif path.startswith(resolve) and path.removeprefix(resolve) in FILES:
            text = FILES[path.removeprefix(resolve)]
            headers = {"ETag": f'"{hashlib.sha1(text).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.reply(200, text, headers, body)
        else:
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)

    def reply(self, status: int, text: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(text)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def fetch(hub: str, directory: Path, tmp_path: Path, revision: str = COMMIT, token: str = TOKEN) -> Any:
    (tmp_path / "token").write_text(token)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")},
        "HF_ENDPOINT": hub, "HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    command = [sys.executable, "-", REPOSITORY, revision, str(directory), "original/*", "*.pth"]
    return subprocess.run(
        command, input=SCRIPT.read_text(), env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_model_is_fetched_at_its_commit_without_what_is_not_wanted(hub: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    done = fetch(hub, directory, tmp_path)
    assert done.returncode == 0, done.stderr
    found = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert found == {name: text for name, text in FILES.items() if not name.startswith("original/")}


def test_a_commit_that_is_not_there(hub: str, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path / "model", tmp_path, revision="f" * 40)
    assert done.returncode != 0


def test_a_wrong_token(hub: str, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path / "model", tmp_path, token="other")
    assert done.returncode != 0
    assert not (tmp_path / "model/config.json").exists()
