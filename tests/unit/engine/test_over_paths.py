"""Real KV between two engines over each own path of the transfer: the tokens are those of one engine alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.engine.drive import greedy, prompt, scribble, tokens_of

from pdstack.engine import Engine, EngineConfig, Request, RequestCancelled
from pdstack.transfer import (
    ChecksumMismatch,
    ClusterKey,
    KVLayout,
    Role,
    TransferAgent,
    TransferConfig,
    TransferError,
    TransferReport,
    allocate_pool,
)
from pdstack.transfer.backends import Exporter
from pdstack.transfer.paths import PATHS
from pdstack.transfer.ticket import Ticket

SETTINGS = EngineConfig.from_dict({"threads": 1, "kv_blocks": 64})


class NoBackend(Exporter):
    """In the backend's place: what is tested reads over the paths, and this process should load no UCX."""

    def metadata(self) -> bytes:
        return b""

    def tend(self) -> None:
        pass

    def close(self) -> None:
        pass


@contextmanager
def engine(tiny: Path, path: str = "backend") -> Iterator[Engine]:
    def pool(*shape: int) -> Any:
        blocks, layers, size, heads, dim = shape
        return allocate_pool(KVLayout(blocks, layers, size, heads, dim), path)

    made = Engine.load(tiny, SETTINGS, pool)
    made.start()
    try:
        yield made
    finally:
        made.stop()


async def agent(role: Role, of: Engine, path: str) -> TransferAgent:
    config = TransferConfig(
        cluster_key=ClusterKey(b"k" * 32), path=path, listen_host="127.0.0.1", listen_port=0, heartbeat_s=1.0
    )
    layout = KVLayout(**of.layout_fields)
    return await TransferAgent.create(
        role, name=f"{role}-0", audience="a", layout=layout, pool=of.pool.array, config=config
    )


async def ship(source: Engine, prefill: TransferAgent, request: Request) -> tuple[Ticket, asyncio.Task[None]]:
    """As the prefill worker does it: the ticket at admission, and the task that computes."""
    tickets: asyncio.Queue[Ticket] = asyncio.Queue()
    name = request.request_id

    def admitted(blocks: list[int], generations: list[int], tokens: int) -> None:
        tickets.put_nowait(
            prefill.export(name, blocks, tokens, None, lambda held, _why: source.release(held), generations)
        )

    async def compute() -> None:
        result = await source.prefill(request, admitted, lambda ready: prefill.advance(name, ready))
        prefill.complete(name, result.first_token)

    computing = asyncio.create_task(compute())
    return await tickets.get(), computing


async def receive(target: Engine, decode: TransferAgent, request: Request, ticket: Ticket) -> TransferReport:
    """As the decode worker does it."""
    there = await target.reserve(request)
    try:
        return await decode.fetch(ticket, there.blocks, there.held)
    except TransferError as error:
        assert error.quarantine is None
        if error.code == "prefix":
            target.forget(there.blocks[error.verified_blocks : there.held])
        target.unreserve(request.request_id, error.verified_blocks)
        raise


async def decoded(target: Engine, request: Request, first_token: int) -> list[int]:
    return [token async for step in target.decode(request, first_token) for token in step.token_ids]


@pytest.mark.parametrize("path", PATHS)
def test_tokens_are_those_of_one_engine_and_never_of_other_memory(
    tiny: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdstack.transfer.prefill.open_exporter", lambda *_: NoBackend())

    async def scenario(source: Engine, target: Engine, alone: Engine) -> None:
        prefill, decode = await agent(Role.PREFILL, source, path), await agent(Role.DECODE, target, path)

        async def serve(name: str, tokens: list[int]) -> int:
            """Serve a prompt; how many blocks did not have to move."""
            request = greedy(name, tokens, 12)
            ticket, computing = await ship(source, prefill, request)
            report = await receive(target, decode, request, ticket)
            await computing
            assert (report.backend, report.transport) == ("path", path)
            assert report.blocks + report.held_blocks == len(ticket.blocks)
            assert await decoded(target, request, report.first_token) == await tokens_of(alone, request)
            return report.held_blocks

        try:
            for length in (1, 16, 17, 300):
                assert await serve(f"r{length}", prompt(length)) == 0
            assert await serve("longer", [*prompt(300), *prompt(20, 1)]) == 18
            # Memory of decode that went bad is found before anything is built on it.
            look = await target.reserve(greedy("look", prompt(300), 12))
            target.pool.array[look.blocks[5]] += np.float32(1)
            target.unreserve("look")
            request = greedy("bad", [*prompt(300), 44], 12)
            ticket, computing = await ship(source, prefill, request)
            with pytest.raises(ChecksumMismatch) as caught:
                await receive(target, decode, request, ticket)
            with suppress(RequestCancelled):  # what decode does not want is not computed to its end
                await computing
            assert (caught.value.code, caught.value.verified_blocks) == ("prefix", 5)
            assert await serve("good", [*prompt(300), 44]) == 5
            # Memory that changes under an export: no token comes of it.
            request = greedy("changed", prompt(100), 12)
            ticket, computing = await ship(source, prefill, request)
            await computing
            source.pool.array[ticket.blocks[-1]] += np.float32(1)
            with pytest.raises(ChecksumMismatch):
                await receive(target, decode, request, ticket)
        finally:
            await decode.close()
            await prefill.close()

    with engine(tiny, path) as source, engine(tiny) as target, engine(tiny) as alone:
        scribble(source)
        scribble(target)
        asyncio.run(scenario(source, target, alone))
