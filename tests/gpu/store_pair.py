"""The test's end of a GPU path test: it is decode, prefill is a process of its own."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from dataclasses import asdict
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

from pdstack.transfer.layout import KVLayout

SRC = Path(__file__).resolve().parents[2] / "src"


class Prefill:
    """A prefill process with a pool of `layout` on `device`, filled by `seed`."""

    def __init__(self, layout: KVLayout, seed: int, device: str = "cuda:0", *wrapper: str) -> None:
        auth = secrets.token_hex(16)
        with Listener(authkey=auth.encode()) as listener:
            self.process = subprocess.Popen(
                [*wrapper, sys.executable, str(Path(__file__).parent / "store_process.py"), str(listener.address)],
                env=os.environ | {"PYTHONPATH": f"{SRC}:{os.environ.get('PYTHONPATH', '')}", "PAIR_AUTH": auth},
            )
            self.pipe = listener.accept()
        self.pipe.send((asdict(layout), seed, device))
        self.metadata: bytes = self.pipe.recv()

    def call(self, *message: Any) -> Any:
        self.pipe.send(message if len(message) > 1 else message[0])
        assert self.pipe.poll(60), "prefill did not answer"
        return self.pipe.recv()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(20)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(20)
        self.pipe.close()
