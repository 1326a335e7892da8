"""Starts agents as real processes and talks to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

KEY = "0123456789abcdef0123456789abcdef"
# 4 layers x k,v x 16 tokens x 4 heads x 32 dims x 4 bytes = 64 KiB a block
LAYOUT = {"num_blocks": 256, "num_layers": 4, "block_size": 16, "num_kv_heads": 4, "head_dim": 32, "model_id": "t"}
SAME_HOST = {"UCX_TLS": "tcp,cma,self", "UCX_NET_DEVICES": "lo"}
TCP = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo"}
_SOURCE = Path(__file__).parents[3] / "src"
_PATIENCE_S = 60.0


class Agent:
    """One agent process. `call` runs a method of `agent_process.End` there, or of what `script` serves."""

    script = Path(__file__).with_name("agent_process.py")
    wrapper: tuple[str, ...] = ()

    def __init__(
        self,
        role: str,
        backend: str,
        *,
        environment: dict[str, str] | None = None,
        name: str = "",
        audience: str = "ns/model",
        key: str = KEY,
        layout: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        self.role, self.name = role, name or f"{role}-0"
        auth = os.urandom(16).hex()
        clean = {k: v for k, v in os.environ.items() if not k.startswith("UCX_")}
        with Listener(authkey=auth.encode()) as listener:
            self.process = subprocess.Popen(
                [*self.wrapper, sys.executable, str(self.script), str(listener.address), self.name],
                env={
                    **clean,
                    **(SAME_HOST if environment is None else environment),
                    "PYTHONPATH": str(_SOURCE),
                    "PAIR_AUTH": auth,
                    "OPENBLAS_NUM_THREADS": "1",
                },
            )
            self.pipe = listener.accept()
        self.pipe.send(
            {
                "role": role,
                "name": self.name,
                "audience": audience,
                "key": key,
                "layout": layout or LAYOUT,
                "config": {"backend": backend, "listen_host": "127.0.0.1", "listen_port": 0, **config},
            }
        )
        self.port = self.call("start")

    def post(self, name: str, *arguments: Any) -> None:
        self.pipe.send((name, arguments))

    def answer(self, timeout_s: float = _PATIENCE_S) -> Any:
        if not self.pipe.poll(timeout_s):
            raise AssertionError(f"{self.name} did not answer within {timeout_s} s")
        kind, value = self.pipe.recv()
        if kind == "raised":
            raise RuntimeError(value)
        return value

    def call(self, name: str, *arguments: Any, timeout_s: float = _PATIENCE_S) -> Any:
        self.post(name, *arguments)
        return self.answer(timeout_s)

    def kill(self, how: int = signal.SIGKILL) -> None:
        self.process.send_signal(how)

    def close(self) -> int:
        """Close cleanly; the process's exit code."""
        if self.process.poll() is None:
            self.call("close")
        self.pipe.close()
        return self.process.wait(_PATIENCE_S)

    def abandon(self) -> None:
        """End it whatever state it is in."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(_PATIENCE_S)
        self.pipe.close()


def until(condition: Callable[[], Any], what: str, timeout_s: float = 45.0) -> Any:
    """The first true value of `condition`."""
    limit = time.monotonic() + timeout_s
    while time.monotonic() < limit:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {timeout_s} s in vain for {what}")
