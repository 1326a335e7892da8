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

import numpy as np
from store_process import content

from pdstack.transfer.gpu.needs import gpu
from pdstack.transfer.gpu.store import CudaStore
from pdstack.transfer.layout import KVLayout

SRC = Path(__file__).resolve().parents[2] / "src"
# Blocks of 32 KiB, 64 MiB in all.
LAYOUT = KVLayout(2048, 4, 16, 2, 64, "float16")
SEED = 17
COUNT = 1500


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
        self.metadata: dict[str, bytes] = self.pipe.recv()

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


def own_store(device: str = "cuda:0") -> tuple[Any, CudaStore]:
    pool = content(LAYOUT, SEED + 1, device)
    return pool, CudaStore(LAYOUT, pool)


def tables(seed: int, count: int = COUNT) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.permutation(LAYOUT.num_blocks)[:count], rng.permutation(LAYOUT.num_blocks)[:count]


def bits(pool: Any) -> Any:
    return pool.cpu().view(gpu().torch.uint8).numpy().reshape(LAYOUT.num_blocks, -1)


def expected(source: Any, target: Any) -> Any:
    wanted, theirs = bits(content(LAYOUT, SEED + 1, "cpu")).copy(), bits(content(LAYOUT, SEED, "cpu"))
    wanted[target] = theirs[source]
    return wanted
