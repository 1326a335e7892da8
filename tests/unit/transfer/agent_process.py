"""One end of a pair of real processes, driven over a pipe. Started by `transfer_pair.py`, never imported by tests.

The tests' own process loads no UCX: a backend reads its environment once, and each case needs another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import resource
import sys
from multiprocessing.connection import Client, Connection
from typing import Any

import numpy as np

from pdstack.transfer import (
    ClusterKey,
    KVLayout,
    Role,
    Ticket,
    TransferAgent,
    TransferConfig,
    TransferError,
    allocate_pool,
)


class End:
    """Runs the commands of the test: each is a method, its result goes back."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.layout = KVLayout(**options["layout"])
        # As in a worker: only prefill's pool is read by others.
        path = options["config"].get("path", "backend") if options["role"] == "prefill" else "backend"
        self.pool: Any = allocate_pool(self.layout, path)
        self.released: list[tuple[str, str]] = []
        self.errors: dict[str, TransferError] = {}
        self.fetches: dict[str, asyncio.Task[dict[str, Any]]] = {}
        self.prompts: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> int:
        config = TransferConfig(cluster_key=ClusterKey(self.options["key"].encode()), **self.options["config"])
        self.agent = await TransferAgent.create(
            Role(self.options["role"]),
            name=self.options["name"],
            audience=self.options["audience"],
            layout=self.layout,
            pool=self.pool,
            config=config,
        )
        return int(getattr(self.agent, "port", 0))

    async def fill(self, seed: int) -> None:
        flat = self.pool.view(np.uint8).reshape(-1)
        flat[:] = np.random.default_rng(seed).integers(0, 256, flat.size, dtype=np.uint8)

    async def block(self, number: int) -> bytes:
        return bytes(self.pool[number].tobytes())

    async def poke(self, number: int, value: float) -> None:
        self.pool[number].reshape(-1)[-1] = value

    async def turn_final(self, request: str) -> int:
        """Turn a bit of a block that is final, so that its hash is known; -1 if there is none (any more)."""
        agent: Any = self.agent
        export = agent._book.of_request(request)
        if export is None or not export.final:
            return -1
        block = export.ticket.blocks[export.final // 2]
        self.pool[block].view(np.uint8).reshape(-1)[5] ^= 16
        return int(block)

    async def export(self, request: str, blocks: list[int], tokens: int = 1) -> dict[str, Any]:
        ticket = self.agent.export(request, blocks, tokens, 7, lambda r, why: self.released.append((r, str(why))))
        return ticket.to_wire()

    async def begin_export(
        self, request: str, blocks: list[int], steps: int, pause_s: float, first_token: int
    ) -> dict[str, Any]:
        """As an engine does it: blocks become final step by step."""
        ticket = self.agent.export(
            request, blocks, len(blocks), None, lambda r, why: self.released.append((r, str(why)))
        )

        async def compute() -> None:
            for step in range(1, steps + 1):
                await asyncio.sleep(pause_s)
                self.agent.advance(request, len(blocks) * step // steps)
            self.agent.complete(request, first_token)

        self.prompts[request] = asyncio.create_task(compute())
        return ticket.to_wire()

    async def fail(self, request: str) -> None:
        if (prompt := self.prompts.pop(request, None)) is not None:
            prompt.cancel()
        self.agent.fail(request, "as asked")

    async def behind(self, port: int, stream_port: int) -> None:
        """Tickets and offers name these ports from now on: something stands between the agents."""
        agent: Any = self.agent
        agent.port = port
        stream = agent._offers._exporters.get("stream")
        if stream is not None:
            values = json.loads(stream._metadata)
            stream._metadata = json.dumps({**values, "port": stream_port}).encode()

    async def stream_port(self) -> int:
        agent: Any = self.agent
        stream = agent._offers._exporters.get("stream")
        return json.loads(stream._metadata)["port"] if stream is not None else 0

    async def digests(self, blocks: list[int]) -> list[str]:
        return [hashlib.sha256(self.pool[block].tobytes()).hexdigest() for block in blocks]

    async def scribble(self, blocks: list[int], value: float) -> None:
        for block in blocks:
            self.pool[block] = value

    async def untouched(self, blocks: list[int], value: float) -> bool:
        return all(bool((self.pool[block] == value).all()) for block in blocks)

    async def records(self) -> list[dict[str, Any]]:
        return self.agent.audit.recent()

    async def releases(self) -> list[tuple[str, str]]:
        return self.released

    async def withdraw(self, request: str) -> bool:
        return await self.agent.withdraw(request)

    async def drain(self, timeout_s: float) -> bool:
        return await self.agent.drain(timeout_s)

    async def fetch(self, wire: dict[str, Any], local: list[int]) -> dict[str, Any]:
        try:
            report = await self.agent.fetch(Ticket.from_wire(wire), local)
        except TransferError as error:
            self.errors[str(wire["request_id"])] = error
            return {"error": type(error).__name__, "code": error.code, "text": str(error),
                    "quarantined": error.quarantine is not None}  # fmt: skip
        return {**vars(report), "gbps": report.gbps}

    async def begin_fetch(self, wire: dict[str, Any], local: list[int]) -> None:
        self.fetches[wire["request_id"]] = asyncio.create_task(self.fetch(wire, local))

    async def reading(self) -> bool:
        return any(link.reads for link in self.agent._links.values())

    async def end_fetch(self, request: str) -> dict[str, Any]:
        return await self.fetches.pop(request)

    async def cancel_fetch(self, request: str) -> bool:
        task = self.fetches.pop(request)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    async def settled(self, request: str) -> None:
        await self.errors[request].settled()

    async def discard(self, wire: dict[str, Any]) -> None:
        await self.agent.discard(Ticket.from_wire(wire))

    async def wrong_role(self) -> list[str]:
        """What the agent says to everything the other role does."""
        ticket: Any = None
        answers = []
        for call in (
            lambda: self.agent.export("r", [0], 1, 0, lambda _r, _why: None),
            lambda: self.agent.withdraw("r"),
            lambda: self.agent.fetch(ticket, [0]),
            lambda: self.agent.discard(ticket),
        ):
            try:
                result: Any = call()
                if asyncio.iscoroutine(result):
                    await result
                answers.append("done")
            except TransferError as error:
                answers.append(type(error).__name__)
            except AttributeError:
                answers.append("own work")
        return answers

    async def stats(self) -> dict[str, Any]:
        return self.agent.stats()

    async def cpu(self) -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    async def close(self) -> None:
        await self.agent.close()


async def serve(pipe: Connection, kind: type[End] = End) -> None:
    end = kind(pipe.recv())
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(pipe.fileno(), ready.set)
    while True:
        await ready.wait()
        ready.clear()
        while pipe.poll():
            try:
                name, arguments = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send(("ok", await getattr(end, name)(*arguments)))
            except Exception as error:
                pipe.send(("raised", f"{type(error).__name__}: {error}"))
            if name == "close":
                return


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format=f"{sys.argv[2]} %(name)s %(levelname)s %(message)s")
    with Client(sys.argv[1], authkey=os.environ["PAIR_AUTH"].encode()) as connection:
        asyncio.run(serve(connection))
