"""An agent whose pool lies in GPU memory, driven as `agent_process` is. Started by tests, never imported by them."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "transfer"))

from agent_process import End, serve

from pdstack.transfer.gpu.needs import gpu


class GpuEnd(End):
    """The same commands; the pool is a tensor."""

    def __init__(self, options: dict[str, Any]) -> None:
        # The host pool that it makes is never touched.
        super().__init__({**options, "config": {**options["config"], "path": "backend"}})
        self.options = options
        torch = gpu().torch
        self.pool = torch.zeros(self.layout.shape, dtype=getattr(torch, self.layout.dtype), device="cuda")
        torch.cuda.synchronize()

    def bits(self) -> Any:
        """The pool as bytes on the GPU, a row a block."""
        return self.pool.view(gpu().torch.uint8).view(self.layout.num_blocks, -1)

    async def fill(self, seed: int) -> None:
        size = (self.layout.num_blocks, self.layout.block_bytes)
        raw = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
        self.bits().copy_(gpu().torch.from_numpy(raw))
        gpu().torch.cuda.synchronize()

    async def block(self, number: int) -> bytes:
        return bytes(self.bits()[number].cpu().numpy().tobytes())

    async def flip(self, number: int) -> None:
        self.bits()[number, 5] ^= 1
        gpu().torch.cuda.synchronize()

    async def everything(self) -> bytes:
        return bytes(self.bits().cpu().numpy().tobytes())

    async def clear(self) -> None:
        self.pool.zero_()
        gpu().torch.cuda.synchronize()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format=f"{sys.argv[2]} %(name)s %(levelname)s %(message)s")
    with Client(sys.argv[1], authkey=os.environ["PAIR_AUTH"].encode()) as connection:
        asyncio.run(serve(connection, GpuEnd))
