"""Live agents and streams that are fed random and nearly right bytes, by strangers and by peers that know the key.

After each case an honest peer is served. Nothing may reach an event loop's or a thread's last resort, nothing may hang,
and memory stays bounded. PDSTACK_FUZZ=100 makes it a hundred times as long, with other cases each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy_stage import NumpyStage
from prometheus_client import CollectorRegistry, generate_latest

from pdstack.transfer import (
    ClusterKey,
    KVLayout,
    Role,
    TransferAgent,
    TransferConfig,
    TransferError,
    TransferMetrics,
    allocate_pool,
)
from pdstack.transfer import channel as control
from pdstack.transfer.channel import MAX_UNREAD, Identity
from pdstack.transfer.paths import CmaExporter, CmaPeer, Region, StreamExporter, StreamPeer, sockets, stream
from pdstack.transfer.paths.offers import Offers
from pdstack.transfer.paths.staged import StagedExporter
from pdstack.transfer.paths.staged_peer import StagedPeer
from pdstack.transfer.plan import blocks
from pdstack.transfer.ticket import issue
from pdstack.transfer.wire import MAX_GREETING, encode

LAYOUT = KVLayout(num_blocks=16, num_layers=2, block_size=4, num_kv_heads=2, head_dim=4, model_id="m")
KEY = ClusterKey(b"k" * 32)
NBYTES = 1 << 20
PATIENCE_S = 60.0
# What came where only a mistake of ours could bring it.
unexpected: list[object] = []


def identity(role: Role = Role.DECODE) -> Identity:
    return Identity(f"{role}-9", "1", role, "a", KEY)


class World:
    """Both agents, on an event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda _loop, context: unexpected.append(context))
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.registry = CollectorRegistry()
        self.prefill = self.call(self._agent(Role.PREFILL, CollectorRegistry()))
        self.decode = self.call(self._agent(Role.DECODE, self.registry))
        self.requests = iter(range(1 << 30))

    async def _agent(self, role: Role, registry: CollectorRegistry) -> TransferAgent:
        pool = allocate_pool(LAYOUT)
        pool[...] = 1.0 if role is Role.PREFILL else 0.0
        config = TransferConfig(
            cluster_key=KEY,
            path="stream",
            listen_host="127.0.0.1",
            listen_port=0,
            heartbeat_s=2.0,  # a machine that is busy otherwise is not a lost peer
            resume_s=0.2,
            read_timeout_s=10.0,
            stall_timeout_s=10.0,
        )
        return await TransferAgent.create(
            role, name=f"{role}-0", audience="a", layout=LAYOUT, pool=pool, config=config,
            metrics=TransferMetrics(registry),
        )  # fmt: skip

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE_S)

    async def export(self) -> Any:
        return self.prefill.export(f"r{next(self.requests)}", [1, 2], 8, 7, lambda _r, _why: None)

    def honest(self) -> None:
        async def fetch() -> int:
            report = await self.decode.fetch(await self.export(), [3, 4])
            return report.first_token

        assert self.call(fetch()) == 7

    def close(self) -> None:
        self.call(self.decode.close())
        self.call(self.prefill.close())
        gc.collect()  # a task that ended with an error nobody looked at says so when it goes
        self.call(asyncio.sleep(0.1))
        self.loop.call_soon_threadsafe(self.loop.stop)


@pytest.fixture(scope="module", autouse=True)
def watched() -> Iterator[None]:
    before, threading.excepthook = threading.excepthook, unexpected.append
    fuzz.CASES.clear()
    yield
    threading.excepthook = before
    print(f"\ncases: {sum(fuzz.CASES.values())} {dict(fuzz.CASES)}")
    assert unexpected == []


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def knock(port: int, chunks: list[bytes]) -> None:
    """Say this, then nothing more; the other end has to hang up."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as sock:
        hear_out(sock, chunks)


def hear_out(sock: socket.socket, chunks: list[bytes]) -> None:
    """Send, then listen until the other end hangs up. TimeoutError if it does not."""
    try:
        for chunk in chunks:
            sock.sendall(chunk)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(1 << 16):
            pass
    except TimeoutError:
        raise
    except OSError:
        pass  # hung up before it had heard all


HELLO = identity().greeting().message("hello")
AUTH = {"type": "auth", "proof": "0" * 64}
framed = (fuzz.documents(HELLO) | fuzz.documents(AUTH)).map(lambda body: encode(body[:MAX_GREETING], MAX_GREETING))
lengths = st.sampled_from([0, 1, MAX_GREETING + 1, 1 << 31, (1 << 32) - 1]).map(lambda n: struct.pack("!I", n))
chunks = st.lists(framed | st.binary(max_size=200) | lengths, min_size=1, max_size=3)
polite = st.just([encode(json.dumps(HELLO).encode(), MAX_GREETING)])
strangers = st.builds(lambda first, rest: [*first, *rest], polite | st.just([]), chunks)


@fuzz.settings(40)
@given(strangers)
def test_strangers_at_the_control_port(world: World, said: list[bytes]) -> None:
    fuzz.count("strangers, control")
    knock(world.prefill.port, said)
    assert unexpected == []
    world.honest()


NAMES = ("id", "ticket", "nonce", "count", "from", "ok", "code", "reason", "hashes", "first", "first_token")
KINDS = ("ping", "pong", "begin", "ack", "done", "discard", "describe", "granted", "refused", "ready", "computed")


def messages(**genuine: st.SearchStrategy[Any]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Frames of any content; some fields are often what they should be."""
    fields = {name: genuine.get(name, fuzz.values) | fuzz.values for name in NAMES}
    kinds = st.sampled_from([*KINDS, "failed"]) | fuzz.texts
    return st.lists(st.fixed_dictionaries({"type": kinds}, optional=fields), max_size=6)


@fuzz.settings(40)
@given(st.data())
def test_a_decode_worker_of_this_cluster_may_say_anything(world: World, data: st.DataObject) -> None:
    fuzz.count("frames to prefill")
    ticket = world.call(world.export())
    wires = st.just(ticket.to_wire()) | fuzz.changed(ticket.to_wire())
    said = data.draw(
        messages(ticket=wires, nonce=st.just(ticket.nonce), count=st.integers(0, 3), **{"from": st.integers(0, 3)})
    )
    ending = data.draw(st.just(b"") | st.binary(max_size=99))

    async def talk() -> None:
        link = await control.connect("127.0.0.1", world.prefill.port, identity())
        for message in said:
            with contextlib.suppress(TransferError):  # longer than a frame may be
                link.send(message)
        link._writer.write(ending)
        with contextlib.suppress(TransferError):
            while True:
                await link.receive(0.005)
        await link.close()

    world.call(talk())
    assert unexpected == []
    world.honest()


def test_who_asks_and_does_not_read_is_hung_up(world: World) -> None:
    async def flood() -> bool:
        link = await control.connect("127.0.0.1", world.prefill.port, identity())
        link._writer.transport.pause_reading()
        before = resident()
        asked = {"type": "begin", "ticket": "x", "id": "y" * (1 << 20)}
        ended = False
        for _ in range(200):
            link.send(asked)
            ended = link._writer.transport.is_closing()
            assert resident() - before < MAX_UNREAD + (64 << 20)
            if ended:
                break
            await asyncio.sleep(0.005)
        link._writer.transport.abort()
        return ended

    assert world.call(flood())
    world.honest()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture(scope="module")
def evil(world: World) -> Iterator[dict[str, Any]]:
    """A prefill agent that knows the key and says what its `script` holds: a description, then answer after answer."""
    script: dict[str, Any] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(TransferError):
            link = await control.accept(reader, writer, identity(Role.PREFILL))
            link.send(script["describe"])
            while script["answers"]:
                message = await link.receive(5)
                if message["type"] != "ping":
                    for answer in script["answers"].pop(0):
                        link.send({**({"id": message.get("id")} if answer.get("id") == 1 else {}), **answer})
        writer.close()

    server = world.call(asyncio.start_server(serve, "127.0.0.1", 0))
    script["port"] = server.sockets[0].getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pdstack.transfer.link._ANSWER_S", 2.0)  # many of them say nothing
        yield script
    world.loop.call_soon_threadsafe(server.close)


@fuzz.settings(40)
@given(st.data())
def test_a_prefill_worker_of_this_cluster_may_say_anything(
    world: World, evil: dict[str, Any], data: st.DataObject
) -> None:
    fuzz.count("frames to decode")
    genuine: Any = world.prefill
    ticket = issue(
        KEY, ttl_s=60, request_id="r", worker="prefill-9", incarnation="1", host="127.0.0.1", port=evil["port"],
        backend="ucx", blocks=(1, 2), generations=(0, 0), tokens=8, layout=genuine._fingerprint, audience="a",
    )  # fmt: skip
    describe = {
        "type": "describe", "backend": "ucx", "layout": genuine._fingerprint, "block_bytes": LAYOUT.block_bytes,
        "num_blocks": LAYOUT.num_blocks, "hashing": "xxh3-64", "metadata": "", "paths": genuine._offers.wire(),
    }  # fmt: skip
    hashes = st.lists(st.integers(0, (1 << 64) - 1), max_size=3)
    script = messages(
        nonce=st.just(ticket.nonce), id=st.just(1), hashes=hashes, first=st.integers(0, 2), first_token=st.just(7)
    )
    granted = st.just([{"type": "granted", "id": 1}])
    evil["describe"] = data.draw(st.just(describe) | fuzz.changed(describe))
    evil["answers"] = [[*data.draw(granted | st.just([])), *data.draw(script)]]

    async def fetch() -> None:
        with pytest.raises(TransferError) as found:
            await world.decode.fetch(ticket, [5, 6])
        await found.value.settled()

    world.call(fetch())
    assert unexpected == []
    generate_latest(world.registry)
    world.honest()


# --- streams


class Streams:
    """An exporter of the paths stream and staged each."""

    def __init__(self) -> None:
        self.source = np.full(NBYTES, 7, np.uint8)
        self.target = np.zeros(NBYTES, np.uint8)
        self.stream = StreamExporter(Region.of(self.source), identity(Role.PREFILL), "127.0.0.1", patience_s=1.0)
        staging = np.zeros(NBYTES, np.uint8)
        stage = NumpyStage(self.source.reshape(-1, 4096), staging, NBYTES // 2)
        self.here = NumpyStage(np.zeros((256, 4096), np.uint8), np.zeros(NBYTES, np.uint8), NBYTES // 2)
        carriers = Offers({"cma": CmaExporter(Region.of(staging))})
        where = "127.0.0.1"
        self.staged = StagedExporter(stage, carriers, identity(Role.PREFILL), where, advertise=where, patience_s=1.0)

    def port(self, path: str) -> int:
        exporter = self.stream if path == "stream" else self.staged
        return int(json.loads(exporter.metadata())["port"])

    def honest(self, path: str) -> None:
        if path == "stream":
            peer = StreamPeer(self.stream.metadata(), Region.of(self.target), identity(), 1, 5.0)
            self.target[:] = 0
            peer.read(blocks(4096, [0, 9], [1, 2]), checksum=True)
            assert (self.target[4096:12288] == 7).all()
            peer.close()
        else:
            makers: dict[str, Callable[[bytes], Any]] = {"cma": lambda blob: CmaPeer(blob, self.here.region, 1)}
            staged = StagedPeer(self.staged.metadata(), self.here, identity(), makers, 5.0)
            staged.read_blocks(np.array([1, 2]), np.array([3, 4]))
            staged.close()

    def close(self) -> None:
        self.stream.close()
        self.staged.close()


@pytest.fixture(scope="module")
def streams() -> Iterator[Streams]:
    made = Streams()
    yield made
    made.close()


@pytest.mark.parametrize("path", ["stream", "staged"])
def test_strangers_at_a_stream(streams: Streams, path: str) -> None:
    @fuzz.settings(40)
    @given(strangers)
    def run(said: list[bytes]) -> None:
        fuzz.count(f"strangers, {path}")
        knock(streams.port(path), said)
        assert unexpected == []
        streams.honest(path)

    run()


extents = st.tuples(
    st.integers(-1, NBYTES) | st.integers(-(1 << 63), (1 << 63) - 1),
    st.integers(-1, 9999) | st.integers(-(1 << 63), (1 << 63) - 1),
)


@pytest.mark.parametrize("path", ["stream", "staged"])
def test_a_decode_worker_may_ask_a_stream_for_anything(streams: Streams, path: str) -> None:
    @fuzz.settings(40)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        fuzz.count(f"requests, {path}")
        with socket.create_connection(("127.0.0.1", streams.port(path)), PATIENCE_S) as sock:
            seal = sockets.connect(sock, identity())
            frames = []
            for _ in range(data.draw(st.integers(1, 3))):
                wanted = data.draw(st.lists(extents, min_size=1, max_size=5))
                body = np.array(wanted, "<i8").tobytes()
                digest = hashlib.sha256(body).hexdigest()
                read = {"type": "read", "extents": len(wanted), "digest": digest, "checksum": True}
                ask = {"type": "stage", "blocks": 2 * len(wanted), "digest": digest}
                free = {"type": "free", "slot": 0}
                request = data.draw(st.one_of(*(st.just(one) | fuzz.changed(one) for one in (read, ask, free))))
                frame = seal.sign(request)
                frame = data.draw(st.just(frame) | fuzz.mutated(frame))
                frames.append(encode(frame[:4096], 4096) + body)
            hear_out(sock, frames)
        assert unexpected == []
        streams.honest(path)

    run()


def test_a_prefill_worker_may_send_a_stream_of_anything(streams: Streams) -> None:
    @fuzz.settings(40)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        fuzz.count("answers, stream")
        honest_header = {"type": "data", "extents": 2, "hash": "0" * 16}
        headers = data.draw(st.lists(st.just(honest_header) | fuzz.changed(honest_header), max_size=3))
        cuts = [data.draw(st.just(None) | st.binary(max_size=50)) for _ in headers]
        greeted = data.draw(st.booleans())

        def serve() -> None:
            sock, _ = server.accept()
            with sock, contextlib.suppress(TransferError, ConnectionError, EOFError, BlockingIOError):
                sockets.tune(sock, 5.0)
                seal = sockets.accept(sock, identity(Role.PREFILL)) if greeted else None
                for header, cut in zip(headers, cuts, strict=True):
                    frame = seal.sign(header) if seal and cut is None else cut or b""
                    sock.sendall(encode(frame[:4096], 4096) + bytes(8192))

        with socket.create_server(("127.0.0.1", 0)) as server:
            thread = threading.Thread(target=serve)
            thread.start()
            metadata = json.dumps({"host": "127.0.0.1", "port": server.getsockname()[1], "nbytes": NBYTES}).encode()
            target = np.zeros(NBYTES, np.uint8)
            with pytest.raises(TransferError):
                peer = StreamPeer(metadata, Region.of(target), identity(), 1, 5.0)
                peer.read(blocks(4096, [0, 9], [1, 3]), checksum=True)
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        assert not target[:4096].any()
        assert not target[16384:].any()
        assert unexpected == []

    run()


def test_a_stranger_that_drips_is_hung_up(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sockets, stream):
        monkeypatch.setattr(module, "HANDSHAKE_S", 0.3)
    with socket.create_connection(("127.0.0.1", streams.port("stream")), PATIENCE_S) as sock:
        sock.settimeout(0.2)
        sock.sendall(struct.pack("!I", 4000))
        hung_up = False
        for _ in range(25):
            try:
                sock.sendall(b"x")
                hung_up = hung_up or sock.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                hung_up = True
            if hung_up:
                break
        assert hung_up
    streams.honest("stream")
