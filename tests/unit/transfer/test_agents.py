"""Both agents in one process, with a real control channel and a backend that copies memory."""

from __future__ import annotations

import asyncio
import ctypes
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from pdstack.transfer import (
    AuthenticationFailed,
    ChecksumMismatch,
    ClusterKey,
    KVLayout,
    PeerUnreachable,
    ReadFailed,
    Refused,
    Role,
    RoleError,
    Ticket,
    TicketError,
    TransferAgent,
    TransferConfig,
    TransferError,
    TransferMetrics,
    allocate_pool,
)
from pdstack.transfer.backends.base import Exporter, Importer, Peer
from pdstack.transfer.layout import PoolView, Run
from pdstack.transfer.transport import Transport
from pdstack.transfer.wire import Greeting, encode

LAYOUT = KVLayout(num_blocks=16, num_layers=2, block_size=4, num_kv_heads=2, head_dim=4, model_id="m")
KEY = ClusterKey(b"k" * 32)


class Copying:
    """A backend inside one process. `gate` holds reads up, `fail` makes them fail, `flip` turns a bit in each block."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.fail = self.flip = False
        self.on_read: Callable[[Sequence[Run]], None] = lambda _runs: None
        self.pools: dict[bytes, PoolView] = {}

    def exporter(self, _backend: str, name: str, pool: PoolView) -> Exporter:
        self.pools[name.encode()] = pool
        return CopyingExporter(name.encode())

    def importer(self, _backend: str, _name: str, pool: PoolView) -> Importer:
        return CopyingImporter(self, pool)


class CopyingExporter(Exporter):
    def __init__(self, name: bytes) -> None:
        self.name = name

    def metadata(self) -> bytes:
        return self.name

    def tend(self) -> None:
        pass

    def close(self) -> None:
        pass


class CopyingImporter(Importer):
    def __init__(self, backend: Copying, pool: PoolView) -> None:
        self.backend, self.pool = backend, pool

    def connect(self, metadata: bytes) -> Peer:
        return CopyingPeer(self.backend, self.pool, self.backend.pools[metadata])

    def close(self) -> None:
        pass


class CopyingPeer(Peer):
    def __init__(self, backend: Copying, local: PoolView, remote: PoolView) -> None:
        self._aborted = threading.Event()
        self.parked = self.dead = False
        self.backend, self.local, self.remote = backend, local, remote

    def read(self, runs: Sequence[Run]) -> None:
        while not self.backend.gate.wait(0.01):
            if self._aborted.is_set():
                raise ReadFailed("the read was aborted")
        if self.backend.fail or self.dead:
            self.dead = True  # as real peers: a connection that failed is closed
            raise ReadFailed("as asked")
        size = self.local.block_bytes
        self.backend.on_read(runs)
        for run in runs:
            target = self.local.address + run.local * size
            ctypes.memmove(target, self.remote.address + run.remote * size, run.blocks * size)
            for block in range(run.blocks if self.backend.flip else 0):
                (ctypes.c_ubyte * size).from_address(target + block * size)[7] ^= 1

    def transport(self, nbytes: int) -> Transport:
        return Transport("memory", "copy memory/self")

    def tend(self) -> None:
        pass

    def close(self) -> None:
        pass


class Pair:
    def __init__(self, backend: Copying, prefill: TransferAgent, decode: TransferAgent) -> None:
        self.backend, self.prefill, self.decode = backend, prefill, decode
        self.released: list[tuple[str, str]] = []

    def export(self, request: str = "r", blocks: Sequence[int] = (1, 2)) -> Ticket:
        return self.prefill.export(request, blocks, len(blocks), 7, lambda r, why: self.released.append((r, str(why))))


async def agent(
    role: Role,
    *,
    name: str = "",
    layout: KVLayout = LAYOUT,
    audience: str = "a",
    generations: Callable[[Sequence[int]], Sequence[int]] | None = None,
    **config: Any,
) -> TransferAgent:
    pool = allocate_pool(layout)
    pool[...] = 1.0 if role is Role.PREFILL else 0.0
    values = {"cluster_key": KEY, "listen_host": "127.0.0.1", "listen_port": 0, "heartbeat_s": 0.1, **config}
    return await TransferAgent.create(
        role,
        name=name or f"{role}-0",
        audience=audience,
        layout=layout,
        pool=pool,
        config=TransferConfig(**values),
        metrics=TransferMetrics(CollectorRegistry()),
        generations=generations,
    )


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Copying:
    copying = Copying()
    monkeypatch.setattr("pdstack.transfer.prefill.open_exporter", copying.exporter)
    monkeypatch.setattr("pdstack.transfer.paths.routes.open_importer", copying.importer)
    return copying


@asynccontextmanager
async def pair_of(backend: Copying, decode_options: dict[str, Any] | None = None, **config: Any) -> AsyncIterator[Pair]:
    prefill = await agent(Role.PREFILL, **config)
    decode = await agent(Role.DECODE, **{**config, **(decode_options or {})})
    try:
        yield Pair(backend, prefill, decode)
    finally:
        backend.gate.set()
        await decode.close()
        await prefill.close()


def run(case: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await case

    asyncio.run(limited())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def in_pair(**options: Any) -> Callable[[Callable[[Pair], Coroutine[Any, Any, None]]], Callable[[Copying], None]]:
    """The test gets a pair made with `options`."""

    def wrap(case: Callable[[Pair], Coroutine[Any, Any, None]]) -> Callable[[Copying], None]:
        def test(backend: Copying) -> None:
            async def body() -> None:
                async with pair_of(backend, **options) as pair:
                    await case(pair)

            run(body())

        return test

    return wrap


async def refused(pair: Pair, ticket: Ticket, code: str, kind: type[TransferError] = TicketError) -> None:
    with pytest.raises(kind) as error:
        await pair.decode.fetch(ticket, list(range(len(ticket.blocks))))
    assert error.value.code == code
    await error.value.settled()


@in_pair()
async def test_fetch_moves_blocks_and_frees_them(pair: Pair) -> None:
    report = await pair.decode.fetch(pair.export(), [5, 6])
    await until(lambda: pair.released == [("r", "read")])
    assert (report.bytes, report.descriptors, report.transport) == (2 * LAYOUT.block_bytes, 1, "memory")
    pool: Any = pair.decode._store.pool
    assert pool[5:7].all()
    assert pool.sum() == pool[5:7].size
    assert pair.decode.stats()["bytes"] == report.bytes


@in_pair()
async def test_roles_do_not_mix(pair: Pair) -> None:
    ticket = pair.export()
    with pytest.raises(RoleError):
        pair.decode.export("r", [0], 1, 0, lambda _r, _why: None)
    for wrong in (
        pair.decode.withdraw("r"),
        pair.decode.drain(0.1),
        pair.prefill.fetch(ticket, [0, 1]),
        pair.prefill.discard(ticket),
    ):
        with pytest.raises(RoleError):
            await wrong


@in_pair()
async def test_a_ticket_is_good_for_one_read(pair: Pair) -> None:
    ticket = pair.export()
    await pair.decode.fetch(ticket, [0, 1])
    await refused(pair, ticket, "replayed", Refused)


@in_pair(ticket_ttl_s=0.2)
async def test_an_unread_export_is_freed_at_its_deadline(pair: Pair) -> None:
    ticket = pair.export()
    await until(lambda: pair.released == [("r", "expired")])
    await refused(pair, ticket, "expired", Refused)


@in_pair(ticket_ttl_s=0.2)
async def test_a_read_under_way_outlives_the_deadline(pair: Pair) -> None:
    pair.backend.gate.clear()
    fetch = asyncio.create_task(pair.decode.fetch(pair.export(), [0, 1]))
    await until(lambda: pair.prefill.stats()["exports"]["granted"])
    other = pair.export("other")
    await until(lambda: pair.released == [("other", "expired")])
    assert not await pair.prefill.withdraw("r")
    pair.backend.gate.set()
    await fetch
    await until(lambda: ("r", "read") in pair.released)
    await refused(pair, other, "expired", Refused)


@in_pair()
async def test_withdrawn_and_unknown_tickets_are_refused(pair: Pair) -> None:
    ticket = pair.export()
    assert await pair.prefill.withdraw("r")
    assert not await pair.prefill.withdraw("r")
    await refused(pair, ticket, "withdrawn", Refused)
    await refused(pair, replace(ticket, nonce="0" * 32).signed(KEY), "unknown", Refused)
    assert pair.released == [("r", "withdrawn")]


@in_pair()
async def test_forged_tickets_are_refused_on_both_sides(pair: Pair) -> None:
    ticket = pair.export()
    await refused(pair, replace(ticket, blocks=(3, 4)), "forged")
    await refused(pair, replace(ticket, generations=(3, 4)), "forged")
    await refused(pair, replace(ticket, direction="decode>prefill").signed(KEY), "direction")
    await refused(pair, replace(ticket, blocks=(3, 4)).signed(ClusterKey(b"x" * 32)), "forged")
    # Signed by the key, but not what prefill issued: only prefill can tell.
    await refused(pair, replace(ticket, blocks=(3, 4)).signed(KEY), "altered", Refused)
    await refused(pair, replace(ticket, worker="prefill-9").signed(KEY), "incarnation")
    await refused(pair, replace(ticket, incarnation="old").signed(KEY), "incarnation")
    await refused(pair, replace(ticket, audience="b").signed(KEY), "audience")
    await refused(pair, replace(ticket, layout="0" * 64).signed(KEY), "layout")
    await refused(pair, replace(ticket, backend="nixl").signed(KEY), "backend")
    assert not pair.released
    await pair.decode.fetch(ticket, [0, 1])


@in_pair()
async def test_discard_frees_at_once(pair: Pair) -> None:
    await pair.decode.discard(pair.export())
    await until(lambda: pair.released == [("r", "discarded")])


@in_pair()
async def test_drain_waits_for_all_exports(pair: Pair) -> None:
    assert await pair.prefill.drain(0.01)
    ticket = pair.export()
    assert not await pair.prefill.drain(0.01)
    drained = asyncio.create_task(pair.prefill.drain(10))
    await pair.decode.fetch(ticket, [0, 1])
    assert await drained


@in_pair()
async def test_a_failed_read_frees_and_the_blocks_may_be_reused(pair: Pair) -> None:
    pair.backend.fail = True
    await refused(pair, pair.export(), "read_failed", ReadFailed)
    await until(lambda: pair.released == [("r", "failed")])


@in_pair()
async def test_changed_blocks_are_noticed(pair: Pair) -> None:
    ticket = pair.export()
    pool: Any = pair.prefill._store.pool
    pool[2].reshape(-1)[3] = 5.0
    await refused(pair, ticket, "checksum", ChecksumMismatch)
    await until(lambda: pair.released == [("r", "failed")])


@in_pair()
async def test_cancelling_a_fetch_waits_for_the_read(pair: Pair) -> None:
    pair.backend.gate.clear()
    fetch = asyncio.create_task(pair.decode.fetch(pair.export(), [0, 1]))
    await until(lambda: pair.prefill.stats()["exports"]["granted"])
    fetch.cancel()
    done, _ = await asyncio.wait([fetch], timeout=0.1)
    assert not done
    pair.backend.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    await until(lambda: pair.released == [("r", "failed")])


@in_pair(read_timeout_s=0.2, resume_s=0.2)
async def test_a_slow_read_times_out_and_is_quarantined_until_it_ends(pair: Pair) -> None:
    pair.backend.gate.clear()
    with pytest.raises(TransferError) as error:
        await pair.decode.fetch(pair.export(), [0, 1])
    assert error.value.code == "read_timeout"
    assert error.value.quarantine is not None
    await error.value.settled()
    assert pair.decode.stats()["quarantined_blocks"] == 0
    await until(lambda: pair.released == [("r", "peer_lost")])
    pair.backend.gate.set()
    await pair.decode.fetch(pair.export("again"), [0, 1])


@in_pair()
async def test_many_fetches_at_once(pair: Pair) -> None:
    tickets = [pair.export(f"r{number}", [number % 16]) for number in range(64)]
    await asyncio.gather(*(pair.decode.fetch(ticket, [number % 16]) for number, ticket in enumerate(tickets)))
    await until(lambda: len(pair.released) == 64)
    assert pair.prefill.stats()["exports"] == {"offered": 0, "granted": 0}


@in_pair()
async def test_impossible_exports_are_refused(pair: Pair) -> None:
    for blocks, tokens in (([16], 1), ([-1], 1), ([0], 5), ([0], 0), ([], 0)):
        with pytest.raises(ValueError, match=r"outside the pool|tokens in"):
            pair.prefill.export("r", blocks, tokens, 0, lambda _r, _why: None)
    with pytest.raises(ValueError, match="outside the pool"):
        await pair.decode.fetch(pair.export(), [0, 16])


@in_pair(decode_options={"cluster_key": ClusterKey(b"y" * 32)})
async def test_another_key_gets_nothing(pair: Pair) -> None:
    ticket = pair.export()
    await refused(pair, ticket.signed(ClusterKey(b"y" * 32)), "auth", AuthenticationFailed)
    assert not pair.released


@in_pair(decode_options={"layout": replace(LAYOUT, head_dim=8)})
async def test_another_layout_gets_nothing(pair: Pair) -> None:
    ticket = pair.export()
    await refused(pair, ticket, "layout", TransferError)
    # Even with a ticket that claims the other layout: prefill describes its own.
    other = replace(LAYOUT, head_dim=8).fingerprint()
    await refused(pair, replace(ticket, layout=other).signed(KEY), "layout", TransferError)


@in_pair(decode_options={"audience": "b"})
async def test_another_audience_is_refused_at_the_door(pair: Pair) -> None:
    ticket = pair.export()
    await refused(pair, ticket, "audience")
    await refused(pair, replace(ticket, audience="b").signed(KEY), "audience", Refused)


def test_a_prefill_that_is_gone_is_unreachable(backend: Copying) -> None:
    async def body() -> None:
        prefill, decode = await agent(Role.PREFILL), await agent(Role.DECODE)
        released: list[str] = []
        first, second = (prefill.export(f"r{i}", [i], 1, 0, lambda _r, why: released.append(str(why))) for i in (0, 1))
        await decode.fetch(first, [0])
        await until(lambda: released)
        await prefill.close()
        assert released == ["read", "closed"]
        with pytest.raises(PeerUnreachable):
            await decode.fetch(second, [0])
        await decode.discard(second)
        await decode.close()

    run(body())


def test_no_bytes_upset_the_server(backend: Copying) -> None:
    """One server for all examples: it must still serve an honest reader after every one of them."""
    hello = Greeting.new("decode-0", "i", Role.DECODE, "a").message("hello")
    attacks = st.one_of(
        st.binary(max_size=80),
        st.binary(max_size=200).map(lambda body: encode(body, 1 << 20)),
        st.binary(max_size=200).map(lambda body: encode(json.dumps(hello).encode(), 4096) + body),
        st.binary(max_size=80).map(
            lambda proof: (
                encode(json.dumps(hello).encode(), 4096)
                + encode(json.dumps({"type": "auth", "proof": proof.hex()}).encode(), 4096)
            )
        ),
    )
    loop = asyncio.new_event_loop()
    pair_context = pair_of(backend)
    pair = loop.run_until_complete(pair_context.__aenter__())
    port = pair.prefill.port  # type: ignore[attr-defined]  # only a prefill agent has one
    numbers = iter(range(10_000))

    async def attack(data: bytes) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        writer.close()
        number = next(numbers)
        await pair.decode.fetch(pair.export(f"r{number}", [number % 16]), [0])

    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(attacks)
    def examples(data: bytes) -> None:
        loop.run_until_complete(asyncio.wait_for(attack(data), 10))

    try:
        examples()
    finally:
        loop.run_until_complete(pair_context.__aexit__(None, None, None))
        loop.close()


@in_pair()
async def test_metrics_tell_what_happened(pair: Pair) -> None:
    await pair.decode.fetch(pair.export(), [0, 1])
    ticket = pair.export("gone")
    await pair.prefill.withdraw("gone")
    await refused(pair, ticket, "withdrawn")
    labels = {"backend": "ucx", "transport": "memory", "peer": "prefill-0"}
    registry = CollectorRegistry()
    assert TransferMetrics(registry)
    value = pair.decode.metrics.bytes.labels(**labels)._value.get()
    assert value == 2 * LAYOUT.block_bytes
    assert pair.decode.metrics.failures.labels("ucx", "prefill-0", "withdrawn")._value.get() == 1
    assert pair.prefill.metrics.refusals.labels("withdrawn")._value.get() == 1
    await until(lambda: pair.prefill.metrics.exported_bytes.labels("decode-0")._value.get() == value)


@in_pair(path="stream")
async def test_metrics_name_the_path_as_the_transport(pair: Pair) -> None:
    report = await pair.decode.fetch(pair.export(), [5, 6])
    assert (report.backend, report.transport) == ("path", "stream")
    metrics = pair.decode.metrics
    assert metrics.bytes.labels("path", "stream", "prefill-0")._value.get() == report.bytes == 2 * LAYOUT.block_bytes
    assert metrics.agent._value["path"] == "stream"
    link: Any = next(iter(pair.decode._links.values()))  # type: ignore[attr-defined]
    link.routes.peer("stream")._peer._cut()  # as a network that drops the connection
    assert (await pair.decode.fetch(pair.export("t"), [7, 8])).transport == "stream"
    assert metrics.transfers.labels("path", "stream", "prefill-0")._value.get() == 2


@in_pair()
async def test_after_a_failed_read_the_next_fetch_makes_a_new_connection(pair: Pair) -> None:
    pair.backend.fail = True
    with pytest.raises(ReadFailed):
        await pair.decode.fetch(pair.export(), [0, 1])
    await until(lambda: pair.released == [("r", "failed")])
    pair.backend.fail = False
    report = await pair.decode.fetch(pair.export(), [0, 1])
    assert report.bytes == 2 * LAYOUT.block_bytes
