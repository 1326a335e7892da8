"""The ways to move KV that `kv_paths` compares: for each, prefill's half and decode's half.

A method is a function from a row's plan to something that moves its bytes once; what happens before that is not
timed (connections, and NIXL's prepared lists, as vLLM prepares them), what happens inside is:
descriptors, lists, waiting.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from pdstack.transfer.backends import nixl as nixl_backend
from pdstack.transfer.backends.nixl import NixlExporter, NixlImporter
from pdstack.transfer.backends.ucx import UcxExporter, UcxImporter
from pdstack.transfer.channel import Identity
from pdstack.transfer.keys import ClusterKey
from pdstack.transfer.layout import KVLayout, PoolView, Run, allocate_pool
from pdstack.transfer.paths import (
    CmaExporter,
    CmaPeer,
    PathPeer,
    Region,
    SharedExporter,
    SharedPeer,
    SharedPool,
    StreamExporter,
    StreamPeer,
)
from pdstack.transfer.plan import Plan
from pdstack.transfer.roles import Role
from pdstack.transfer.transport import UcxLog

Bytes = npt.NDArray[np.uint8]
Move = Callable[[], object]
HOST = "127.0.0.1"
# Mooncake 0.3.13 rejects what does not fit its lanes' queues, and then the connection is lost.
MOONCAKE_BATCH = 2048


class Row:
    """One case: blocks of one size between two pools, as block numbers and as a merged plan."""

    def __init__(self, source: npt.NDArray[np.int64], target: npt.NDArray[np.int64], size: int, plan: Plan) -> None:
        self.source, self.target, self.size, self.plan = source, target, size, plan


def private_pool(nbytes: int) -> Bytes:
    """Anonymous memory in huge pages where the kernel may, as the agents have it."""
    pool = allocate_pool(KVLayout(nbytes, 1, 1, 1, 1, "int8")).reshape(-1)[:nbytes].view(np.uint8)
    pool[:] = 0
    return pool


def identity(role: Role) -> Identity:
    """Both ends are of one cluster."""
    return Identity(f"bench-{role.value}", "1", role, "bench", ClusterKey(b"benchmark only " * 3))


def mooncake_engine() -> tuple[Any, str]:
    """A Mooncake engine over TCP, or None and the reason why there is none."""
    try:
        from mooncake.engine import TransferEngine  # type: ignore[import-not-found]
    except ImportError as error:
        return None, f"cannot be imported: {error}"
    engine = TransferEngine()
    if engine.initialize(HOST, "P2PHANDSHAKE", "tcp", ""):
        return None, "its TCP transport did not start"
    return engine, ""


# --- prefill


class RawServer:
    """Sends runs of a pool to whoever asks: the plainest socket there is, and the yardstick of loopback TCP."""

    def __init__(self, pool: memoryview) -> None:
        self._pool = pool
        self._listener = socket.create_server((HOST, 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            threading.Thread(target=self._answer, args=(sock,), daemon=True).start()

    def _answer(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while asked := sock.recv(16, socket.MSG_WAITALL):
            begin, size = np.frombuffer(asked, np.int64).tolist()
            sock.sendall(self._pool[begin : begin + size])


class PrefillEnd:
    """Prefill's pools, twice the same bytes: its own memory and the shared one; and all exporters of them."""

    def __init__(self, nbytes: int, fabric: str) -> None:
        self._kept: list[Any] = []
        own = private_pool(nbytes)
        fill(own)
        region, view = Region.of(own), PoolView(own.ctypes.data, 4096, nbytes // 4096)
        nixl, ucx = NixlExporter("bench", view), UcxExporter("bench", view)
        self.metadata: dict[str, Any] = {"nixl": nixl.metadata(), "ucx": ucx.metadata(), "base": own.ctypes.data}
        self._kept += [own, nixl, ucx]
        if fabric == "host":
            shared = SharedPool(nbytes)
            fill(shared.array)
            exporter, cma = SharedExporter(shared), CmaExporter(region)
            self._kept += [shared, exporter, cma]
            self.metadata |= {"shared": exporter.metadata(), "cma": cma.metadata(), "pages": shared.pages()._asdict()}
        else:
            stream = StreamExporter(region, identity(Role.PREFILL), HOST)
            raw = RawServer(region.bytes())
            self._kept += [stream, raw]
            self.metadata |= {"stream": stream.metadata(), "raw": raw.port}
            engine, _ = mooncake_engine()
            if engine is not None and not engine.register_memory(own.ctypes.data, nbytes):
                self._kept.append(engine)
                self.metadata["mooncake"] = f"{HOST}:{engine.get_rpc_port()}"


def fill(pool: Bytes) -> None:
    """Give every eight bytes a value that says where they are."""
    words = pool.view(np.uint64)
    for begin in range(0, len(words), 1 << 20):
        words[begin : begin + (1 << 20)] = values(np.arange(begin, min(begin + (1 << 20), len(words)), dtype=np.uint64))


def values(places: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """What :func:`fill` writes to these words."""
    return places * np.uint64(0x9E3779B97F4A7C15)


def wrong_bytes(row: Row, target: Bytes) -> int:
    """How many blocks of the row do not hold what prefill has; every word is looked at."""
    words = row.size // 8
    rows, wrong = target.view(np.uint64).reshape(-1, words), 0
    inside = np.arange(words, dtype=np.uint64)
    step = max(1, (16 << 20) // row.size)
    for begin in range(0, len(row.source), step):
        source = row.source[begin : begin + step].astype(np.uint64)
        wanted = values(source[:, None] * np.uint64(words) + inside)
        wrong += int((rows[row.target[begin : begin + step]] != wanted).any(axis=1).sum())
    return wrong


# --- decode


class DecodeEnd:
    """The target pool, and for each method a function that makes a row's move."""

    def __init__(self, nbytes: int, fabric: str, metadata: dict[str, Any], threads: int) -> None:
        self.pool = private_pool(nbytes)
        self.notes: list[str] = []
        self._metadata, self._nbytes = metadata, nbytes
        self._region = Region.of(self.pool)
        self.methods: dict[str, Callable[[Row], Move]] = {}
        self._nixl()
        self.methods["ucx"] = self._ucx
        if fabric == "host":
            self._host(threads)
        else:
            self._tcp()

    def _path(self, name: str, peer: PathPeer, checksum: bool) -> None:
        self.methods[name] = lambda row: lambda: peer.read(row.plan, checksum=checksum)

    def _host(self, threads: int) -> None:
        source = private_pool(self._nbytes)
        source[:] = 1
        move = ctypes.memmove

        def memcpy(row: Row) -> Move:
            return lambda: move(self.pool.ctypes.data, source.ctypes.data, row.plan.total)

        self.methods["memcpy"] = memcpy
        for many in sorted({1, threads}):
            shared = SharedPeer(self._metadata["shared"], self._region, many)
            cma = CmaPeer(self._metadata["cma"], self._region, many)
            self._path(f"shared x{many}", shared, False)
            self._path(f"cma x{many}", cma, False)
            if many == threads:
                self._path(f"shared x{many} + xxh3", shared, True)
                self._path(f"cma x{many} + xxh3", cma, True)

    def _tcp(self) -> None:
        for many in (1, 2):
            self.methods["socket" if many == 1 else "2 sockets"] = self._raw(many)
            stream = StreamPeer(self._metadata["stream"], self._region, identity(Role.DECODE), many)
            self._path(f"stream x{many}", stream, False)
            if many == 2:
                self._path(f"stream x{many} + xxh3", stream, True)
        engine, why = mooncake_engine()
        if engine is None or "mooncake" not in self._metadata:
            self.notes.append(f"mooncake is left out: {why or 'the other end has none'}")
            return
        engine.register_memory(self.pool.ctypes.data, self._nbytes)
        peer = self._metadata["mooncake"]

        def mooncake(row: Row) -> Move:
            def go() -> None:
                local = (row.plan.target + self.pool.ctypes.data).tolist()
                remote = (row.plan.source + self._metadata["base"]).tolist()
                sizes = row.plan.nbytes.tolist()
                for begin in range(0, len(sizes), MOONCAKE_BATCH):
                    part = slice(begin, begin + MOONCAKE_BATCH)
                    if engine.batch_transfer_sync_read(peer, local[part], remote[part], sizes[part]):
                        raise RuntimeError("Mooncake's read failed")

            return go

        self.methods["mooncake"] = mooncake

    def _raw(self, many: int) -> Callable[[Row], Move]:
        sockets = [socket.create_connection((HOST, self._metadata["raw"])) for _ in range(many)]
        workers = ThreadPoolExecutor(many)
        memory = self._region.bytes()

        def take(sock: socket.socket, begin: int, size: int) -> None:
            sock.sendall(np.array([begin, size], np.int64).tobytes())
            view = memory[begin : begin + size]
            while view:
                view = view[sock.recv_into(view, 0, socket.MSG_WAITALL) :]

        def prepare(row: Row) -> Move:
            share = row.plan.total // many

            def go() -> None:
                parts = [workers.submit(take, sock, i * share, share) for i, sock in enumerate(sockets)]
                for part in parts:
                    part.result()

            return go

        return prepare

    def _ucx(self, row: Row) -> Move:
        view = PoolView(self.pool.ctypes.data, row.size, self._nbytes // row.size)
        peer = UcxImporter("bench", view).connect(self._metadata["ucx"])
        starts = zip(row.plan.source, row.plan.target, row.plan.nbytes, strict=True)
        runs = [Run(int(a) // row.size, int(b) // row.size, int(n) // row.size) for a, b, n in starts]
        return lambda: peer.read(runs)

    def _nixl(self) -> None:
        # The agent of the backend: its progress sleeps where the wheel's own would burn a core on each side.
        UcxLog.of("nixl")
        agent = nixl_backend._agent(f"bench-raw-{os.getpid()}", progress_thread=False)
        found = json.loads(self._metadata["nixl"])
        agent.register_memory([(self.pool.ctypes.data, self._nbytes, 0, "kv")], "DRAM")
        remote = agent.add_remote_agent(base64.b64decode(found["nixl"]))
        base, here = int(found["base"]), self.pool.ctypes.data

        def finish(handle: Any) -> None:
            state = agent.transfer(handle)
            while state == "PROC":
                time.sleep(0)
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise RuntimeError(f"NIXL ended in state {state}")
            agent.release_xfer_handle(handle)

        def naive(row: Row) -> Move:
            source, target, size = row.source, row.target, row.size

            def go() -> None:
                mine = agent.get_xfer_descs([(here + b * size, size, 0) for b in target.tolist()], "DRAM")
                theirs = agent.get_xfer_descs([(base + b * size, size, 0) for b in source.tolist()], "DRAM")
                finish(agent.initialize_xfer("READ", mine, theirs, remote))

            return go

        def prepped(row: Row) -> Move:
            count, size = self._nbytes // row.size, row.size
            table = np.zeros((2, count, 3), np.uint64)
            table[:, :, 0] = np.arange(count, dtype=np.uint64) * np.uint64(size)
            table[0, :, 0] += np.uint64(here)
            table[1, :, 0] += np.uint64(base)
            table[:, :, 1] = size
            mine = agent.prep_xfer_dlist("", table[0], "DRAM")
            theirs = agent.prep_xfer_dlist(remote, table[1], "DRAM")
            lists = row.target.astype(np.int32), row.source.astype(np.int32)
            return lambda: finish(agent.make_prepped_xfer("READ", mine, lists[0], theirs, lists[1]))

        def merged(row: Row) -> Move:
            view = PoolView(self.pool.ctypes.data, row.size, self._nbytes // row.size)
            peer = NixlImporter("bench", view).connect(self._metadata["nixl"])
            starts = zip(row.plan.source, row.plan.target, row.plan.nbytes, strict=True)
            runs = [Run(int(a) // row.size, int(b) // row.size, int(n) // row.size) for a, b, n in starts]
            return lambda: peer.read(runs)

        self.methods |= {"nixl naive": naive, "nixl prepped": prepped, "nixl merged": merged}
