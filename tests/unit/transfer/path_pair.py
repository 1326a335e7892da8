"""The test's end of a path test: it is decode, prefill is a process of its own."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import numpy as np

from pdstack.transfer.channel import Identity
from pdstack.transfer.keys import ClusterKey
from pdstack.transfer.paths import CmaPeer, PathPeer, Region, SharedPeer, StreamPeer
from pdstack.transfer.roles import Role

KEY = b"k" * 32
PATHS = ("shared", "cma", "stream")


class Prefill:
    """A prefill process whose pool holds `content`."""

    def __init__(self, nbytes: int) -> None:
        self.content = np.random.default_rng(11).integers(0, 255, nbytes, np.uint8)
        auth = secrets.token_hex(16)
        with Listener(authkey=auth.encode()) as listener:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "path_process.py"), str(listener.address)],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "src"), "PAIR_AUTH": auth},
            )
            self.pipe = listener.accept()
        self.pipe.send((nbytes, KEY))
        self.metadata: dict[str, bytes] = self.pipe.recv()

    def call(self, *message: Any) -> Any:
        self.pipe.send(message if len(message) > 1 else message[0])
        assert self.pipe.poll(20), "prefill did not answer"
        return self.pipe.recv()

    def kill(self, how: int = signal.SIGKILL) -> None:
        self.process.send_signal(how)
        if how == signal.SIGKILL:
            self.process.wait(10)

    def abandon(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self.pipe.close()


def identity(role: Role = Role.DECODE, key: bytes = KEY) -> Identity:
    return Identity("decode-0", "run-1", role, "ns/model", ClusterKey(key))


def connect(path: str, metadata: bytes, target: Region, **options: Any) -> PathPeer:
    if path == "stream":
        return StreamPeer(metadata, target, options.pop("identity", identity()), **options)
    options.pop("patience_s", None)
    return {"shared": SharedPeer, "cma": CmaPeer}[path](metadata, target, **options)
