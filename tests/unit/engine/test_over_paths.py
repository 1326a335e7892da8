"""Real KV between two engines over each own path of the transfer: the tokens are those of one engine alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.engine.drive import greedy, prompt, scribble, tokens_of

from pdstack.engine import Engine, EngineConfig, Request
from pdstack.transfer import ChecksumMismatch, ClusterKey, KVLayout, Role, TransferAgent, TransferConfig, allocate_pool
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


async def export(source: Engine, prefill: TransferAgent, request: Request) -> Ticket:
    """As the prefill worker does it."""
    result = await source.prefill(request)
    name, tokens = request.request_id, len(request.token_ids)
    return prefill.export(name, result.blocks, tokens, result.first_token, lambda held, _why: source.release(held))


@pytest.mark.parametrize("path", PATHS)
def test_tokens_are_those_of_one_engine_and_never_of_other_memory(
    tiny: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdstack.transfer.prefill.open_exporter", lambda *_: NoBackend())

    async def scenario(source: Engine, target: Engine, alone: Engine) -> None:
        prefill, decode = await agent(Role.PREFILL, source, path), await agent(Role.DECODE, target, path)
        try:
            for length in (1, 16, 17, 300):
                request = greedy(f"r{length}", prompt(length), 12)
                wanted = await tokens_of(alone, request)
                ticket = await export(source, prefill, request)
                blocks = (await target.reserve(request)).blocks
                report = await decode.fetch(ticket, blocks)
                assert (report.backend, report.transport) == ("path", path)
                found = [token async for step in target.decode(request, report.first_token) for token in step.token_ids]
                assert found == wanted
            # Memory that changes under an export: no token comes of it.
            request = greedy("changed", prompt(100), 12)
            ticket = await export(source, prefill, request)
            source.pool.array[ticket.blocks[-1]] += np.float32(1)
            with pytest.raises(ChecksumMismatch):
                await decode.fetch(ticket, (await target.reserve(request)).blocks)
            target.unreserve(request.request_id)
        finally:
            await decode.close()
            await prefill.close()

    with engine(tiny, path) as source, engine(tiny) as target, engine(tiny) as alone:
        scribble(source)
        scribble(target)
        asyncio.run(scenario(source, target, alone))
