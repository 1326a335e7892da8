"""Prefill's process of a GPU path test: a pool of known content, exported. Started by `store_pair.py`."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Client
from typing import Any

from pdstack.transfer.channel import Identity
from pdstack.transfer.gpu.needs import gpu
from pdstack.transfer.gpu.store import CudaStore
from pdstack.transfer.keys import ClusterKey
from pdstack.transfer.layout import KVLayout
from pdstack.transfer.paths.gpu_ways import exporters
from pdstack.transfer.roles import Role


def identity(role: Role) -> Identity:
    return Identity(role.value, "run-1", role, "ns/model", ClusterKey(b"k" * 32))


def content(layout: KVLayout, seed: int, device: str) -> Any:
    """A pool that any process can make again: float16 of random bits, as bytes."""
    torch = gpu().torch
    generator = torch.Generator(device="cpu").manual_seed(seed)
    raw = torch.randint(0, 256, (layout.block_bytes * layout.num_blocks,), generator=generator, dtype=torch.uint8)
    return raw.to(device).view(getattr(torch, layout.dtype)).view(layout.shape)


def main() -> None:
    with Client(sys.argv[1], authkey=os.environ["PAIR_AUTH"].encode()) as pipe:
        fields, seed, device = pipe.recv()
        layout = KVLayout(**fields)
        pool = content(layout, seed, device)
        store = CudaStore(layout, pool)
        makers = exporters(store, identity(Role.PREFILL), "127.0.0.1", 0, "", advertise="127.0.0.1", patience_s=5)
        made = {name: make() for name, make in makers.items()}
        pipe.send({name: exporter.metadata() for name, exporter in made.items()})
        flat = pool.view(gpu().torch.uint8).view(layout.num_blocks, -1)
        while True:
            match pipe.recv():
                case ("hashes", blocks):
                    pipe.send(store.hashes(blocks))
                case ("poke", block, at, value):
                    flat[block, at] = value
                    gpu().torch.cuda.synchronize()
                    pipe.send(None)
                case "pid":
                    pipe.send(os.getpid())


if __name__ == "__main__":
    main()
