"""The own paths between two real processes: right bytes, nothing beside them, and what death and frost do."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from path_pair import PATHS, Prefill, connect, identity

from pdstack.transfer.errors import AuthenticationFailed, ChecksumMismatch, ReadFailed, TransferError
from pdstack.transfer.paths import CmaPeer, Region, SharedPeer, SharedPool, StreamExporter, copying
from pdstack.transfer.paths.copying import LocalCopy, Mover, Vectors
from pdstack.transfer.paths.shared import SEALS, SharedExporter, receive
from pdstack.transfer.plan import Plan, blocks, merge, split
from pdstack.transfer.roles import Role
from pdstack.transfer.store import HASH_UNIT

POOL = 24 << 20
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def prefill() -> Iterator[Prefill]:
    """One that no test harms."""
    process = Prefill(POOL)
    yield process
    process.abandon()


@pytest.fixture
def mortal() -> Iterator[Callable[[int], Prefill]]:
    started: list[Prefill] = []

    def start(nbytes: int) -> Prefill:
        started.append(Prefill(nbytes))
        return started[-1]

    yield start
    for process in started:
        process.abandon()


def scattered(size: int, count: int, pool: int = POOL) -> Plan:
    rng = np.random.default_rng(size)
    return blocks(size, rng.permutation(pool // size)[:count], rng.permutation(pool // size)[:count])


def ragged() -> Plan:
    """Extents of 1 byte to 3 MiB at odd offsets."""
    sizes = np.array([1, 3, 4097, 3 << 20, 65535, 16384, 2, 700_001])
    source = np.cumsum([5, *(sizes[:-1] + 7)])
    return merge(source[::-1], np.cumsum([1, *(sizes[::-1][:-1] + 3)]), sizes[::-1])


def wanted(plan: Plan, content: np.ndarray) -> np.ndarray:
    target = np.full(POOL, 0xA5, np.uint8)
    for begin, to, size in zip(plan.source, plan.target, plan.nbytes, strict=True):
        target[to : to + size] = content[begin : begin + size]
    return target


def short_runs() -> Plan:
    """1, 2 or 3 blocks of 2 KiB a run, each run of a place of its own."""
    rng = np.random.default_rng(2)
    runs = rng.integers(1, 4, 900) * 2048
    return merge(rng.permutation(1000)[:900] * 8192 + 2048, rng.permutation(1000)[:900] * 8192, runs)


PLANS = {
    "short runs": short_runs(),
    "odd and short": merge(np.arange(3000) * 700 + 3, np.arange(3000)[::-1] * 701, np.full(3000, 699)),
    "contiguous": blocks(4096, range(2000), range(100, 2100)),
    "4 KiB": scattered(4096, 4000),
    "32 KiB": scattered(32768, 300),
    "1 MiB": scattered(1 << 20, 10),
    "ragged": ragged(),
    "nothing": blocks(4096, [], []),
}


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("path", PATHS)
def test_reads_what_the_plan_says_and_touches_nothing_else(
    prefill: Prefill, path: str, plan: Plan, checksum: bool
) -> None:
    target = np.full(POOL, 0xA5, np.uint8)
    peer = connect(path, prefill.metadata[path], Region.of(target))
    hashes = peer.read(plan, checksum=checksum)
    assert np.array_equal(target, wanted(plan, prefill.content))
    if checksum:
        pieces = split(plan, HASH_UNIT)
        assert np.array_equal(hashes, prefill.call("hashes", pieces.source, pieces.nbytes))
        assert len(pieces) == 0 or pieces.nbytes.max() <= HASH_UNIT
    else:
        assert hashes is None
    peer.read(plan, checksum=checksum)  # a peer is good for more than one read
    peer.close()
    with pytest.raises(ReadFailed, match="closed"):
        peer.read(plan)


@pytest.mark.parametrize("path", PATHS)
def test_plans_outside_the_pools_are_refused_before_anything_moves(prefill: Prefill, path: str) -> None:
    target = np.zeros(POOL // 2, np.uint8)
    peer = connect(path, prefill.metadata[path], Region.of(target))
    for plan in (Plan(*np.array([[POOL - 10], [0], [11]])), Plan(*np.array([[0], [POOL // 2 - 10], [11]]))):
        with pytest.raises(ValueError, match="pool"):
            peer.read(plan)
    assert not target.any()
    peer.close()


@pytest.mark.parametrize("path", PATHS)
def test_an_aborted_peer_reads_no_more(prefill: Prefill, path: str) -> None:
    target = np.zeros(POOL, np.uint8)
    peer = connect(path, prefill.metadata[path], Region.of(target))
    peer.abort()
    with pytest.raises(ReadFailed):
        peer.read(PLANS["32 KiB"])
    assert not target.any()
    peer.close()


def in_the_middle(
    peer_read: Callable[[], object], target: np.ndarray, act: Callable[[], object]
) -> BaseException | None:
    """Begin a read in a thread, `act` once bytes have begun to arrive, and say how the read ended."""
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            peer_read()
        except BaseException as error:
            ended.append(error)
        else:
            ended.append(None)

    thread = threading.Thread(target=run)
    thread.start()
    limit = time.monotonic() + 10
    # Reading any byte of an extent that lands early is enough: the source has few zeros, the target only zeros.
    while not target[: 1 << 20].any() and not ended and time.monotonic() < limit:
        pass
    act()
    thread.join(30)
    assert ended, "the read did not end"
    return ended[0]


BIG = 64 << 20


@pytest.mark.parametrize("path", PATHS)
def test_kill_of_prefill_in_the_middle_of_a_read(mortal: Callable[[int], Prefill], path: str) -> None:
    prefill = mortal(BIG)
    target = np.zeros(BIG, np.uint8)
    order = np.arange(BIG >> 15)
    plan = blocks(32768, order[::-1], order)
    peer = connect(path, prefill.metadata[path], Region.of(target))
    error = in_the_middle(lambda: peer.read(plan), target, prefill.kill)
    right = prefill.content.reshape(-1, 32768)[::-1].reshape(-1)
    if error is None:
        # The memory of a dead process is still there if we have mapped it, or the read was faster.
        assert np.array_equal(target, right)
        assert path == "shared" or prefill.process.poll() is not None
    else:
        assert path != "shared"
        assert isinstance(error, ReadFailed), error
    before = target.copy()
    time.sleep(0.05)  # time in which a late write could come: there is nothing to wait for
    assert np.array_equal(target, before)
    peer.close()
    with pytest.raises(ReadFailed):
        connect(path, prefill.metadata[path], Region.of(target))


@pytest.mark.parametrize("path", PATHS)
def test_a_frozen_prefill_never_writes_later(mortal: Callable[[int], Prefill], path: str) -> None:
    prefill = mortal(BIG)
    target = np.zeros(BIG, np.uint8)
    order = np.arange(BIG >> 15)
    peer = connect(path, prefill.metadata[path], Region.of(target), patience_s=0.5)
    error = in_the_middle(
        lambda: peer.read(blocks(32768, order[::-1], order)), target, lambda: prefill.kill(signal.SIGSTOP)
    )
    # The kernel, and our own mapping, need no help of the frozen process; a socket does.
    assert error is None if path != "stream" else error is None or isinstance(error, ReadFailed)
    if path == "stream" and error is not None:
        assert "silent for" in str(error)
    target[:] = 7
    prefill.kill(signal.SIGCONT)
    prefill.call("pid")
    time.sleep(0.1)  # time in which a late write could come: there is nothing to wait for
    assert (target == 7).all()
    peer.close()


def test_abort_ends_a_stream_whose_prefill_is_frozen(mortal: Callable[[int], Prefill]) -> None:
    prefill = mortal(POOL)
    target = np.zeros(POOL, np.uint8)
    peer = connect("stream", prefill.metadata["stream"], Region.of(target))
    prefill.kill(signal.SIGSTOP)
    timer = threading.Timer(0.3, peer.abort)
    timer.start()
    with pytest.raises(ReadFailed, match="aborted"):
        peer.read(PLANS["32 KiB"])
    target[:] = 7
    prefill.kill(signal.SIGCONT)
    prefill.call("pid")
    assert (target == 7).all()


# --- shared


def test_decode_cannot_write_prefills_pool_in_any_way(prefill: Prefill) -> None:
    fd, nbytes = receive(prefill.metadata["shared"])
    assert nbytes == POOL
    opened = [fd]
    try:
        for flags in (os.O_RDWR, os.O_RDONLY):
            opened.append(os.open(f"/proc/self/fd/{fd}", flags))
        pid, _ = prefill.call("pid")
        for entry in os.listdir(f"/proc/{pid}/fd"):
            where = f"/proc/{pid}/fd/{entry}"
            if "pdstack-kv" in os.readlink(where):
                opened.append(os.open(where, os.O_RDWR))
        assert len(opened) >= 4
        for number in opened:
            with pytest.raises(PermissionError):
                mmap.mmap(number, POOL, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            with pytest.raises(OSError) as refused:
                os.pwrite(number, b"x", 0)
            assert refused.value.errno in (errno.EPERM, errno.EBADF, errno.EINVAL)  # hugetlb knows no write at all
            with pytest.raises(OSError):
                os.ftruncate(number, 0)
            # A private mapping may be written, and changes nobody's bytes but our own.
            private = mmap.mmap(number, POOL, flags=mmap.MAP_PRIVATE)
            private[0] = prefill.content[0] ^ 0xFF
            with mmap.mmap(number, POOL, prot=mmap.PROT_READ) as readable:
                assert readable[0] == prefill.content[0]
                address = np.frombuffer(readable, np.uint8).ctypes.data
                assert _libc.mprotect(ctypes.c_void_p(address), 4096, mmap.PROT_READ | mmap.PROT_WRITE) == -1
                assert ctypes.get_errno() == errno.EACCES
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    finally:
        for number in opened:
            os.close(number)
    assert prefill.call("hashes", np.array([0]), np.array([4096])) is not None


def test_prefill_itself_still_writes_and_decode_sees_it(mortal: Callable[[int], Prefill]) -> None:
    prefill = mortal(1 << 20)
    target = np.zeros(1 << 20, np.uint8)
    peer = connect("shared", prefill.metadata["shared"], Region.of(target))
    prefill.call("poke", 77, prefill.content[77] ^ 0xFF)
    peer.read(blocks(4096, [0], [0]))
    assert target[77] == prefill.content[77] ^ 0xFF
    peer.close()


def test_pages_are_huge_where_the_kernel_can_and_reported_from_smaps(prefill: Prefill) -> None:
    pool = SharedPool(8 << 20)
    smaps = Path("/proc/self/smaps").read_text().splitlines()
    begin = next(i for i, line in enumerate(smaps) if line.startswith(f"{pool.region.address:x}-"))
    lines = {line.split(":")[0]: int(line.split()[1]) << 10 for line in smaps[begin + 1 : begin + 22]}
    huge = (8 << 20) if lines["KernelPageSize"] > 4096 else lines["ShmemPmdMapped"]
    assert pool.pages().huge == huge
    assert pool.pages().kind in ("huge", "mixed", "small")
    assert pool.region.address % (2 << 20) == 0
    pool.close()


def test_the_pool_outlives_its_descriptor_as_long_as_the_array(tmp_path: object) -> None:
    pool = SharedPool(1 << 20)
    array = pool.array
    pool.close()
    del pool
    array[:] = 3
    assert int(array.sum()) == 3 << 20


def test_a_socket_in_a_directory_serves_containers_without_a_common_network(tmp_path: object) -> None:
    pool = SharedPool(1 << 20)
    exporter = SharedExporter(pool, str(tmp_path))
    target = np.ones(1 << 20, np.uint8)
    peer = SharedPeer(exporter.metadata(), Region.of(target))
    peer.read(blocks(4096, [1], [0]))
    assert not target[:4096].any()
    exporter.close()
    assert os.listdir(str(tmp_path)) == []
    peer.read(blocks(4096, [1], [1]))  # mapped is mapped
    peer.close()
    pool.close()
    with pytest.raises(ReadFailed, match="cannot be opened"):
        SharedPeer(exporter.metadata(), Region.of(target))


def test_a_wrong_token_gets_nothing(prefill: Prefill) -> None:
    values = json.loads(prefill.metadata["shared"])
    with pytest.raises(ReadFailed, match="token"):
        receive(json.dumps({**values, "token": "0" * 64}).encode())


def test_an_unsealed_pool_is_refused(tmp_path: object) -> None:
    pool = SharedPool(1 << 20)
    plain = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(plain, 2 << 20)
    genuine, pool._fd = pool._fd, plain
    exporter = SharedExporter(pool)
    try:
        with pytest.raises(ReadFailed, match=f"wanted {SEALS:#x}"):
            SharedPeer(exporter.metadata(), Region.of(np.zeros(1, np.uint8)))
    finally:
        exporter.close()
        pool.close()
        os.close(genuine)


# --- cma


def test_cma_tells_a_stranger_from_a_dead_peer(prefill: Prefill, mortal: Callable[[int], Prefill]) -> None:
    target = Region.of(np.zeros(4096, np.uint8))
    values = json.loads(prefill.metadata["cma"])
    with pytest.raises(ReadFailed, match="another process") as gone:
        CmaPeer(json.dumps({**values, "started": "1"}).encode(), target)
    assert gone.value.code == "peer_gone"
    with pytest.raises(ReadFailed, match="pid: host") as apart:
        CmaPeer(json.dumps({**values, "namespace": 1}).encode(), target)
    assert apart.value.code == "not_permitted"
    with pytest.raises(ReadFailed, match="another host"):
        CmaPeer(json.dumps({**values, "boot": "0" * 36}).encode(), target)
    victim = mortal(1 << 20)
    peer = CmaPeer(victim.metadata["cma"], target)
    victim.kill()
    with pytest.raises(ReadFailed) as dead:
        peer.read(blocks(4096, [0], [0]))
    assert dead.value.code == "peer_gone"
    peer.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its rights to show what is missing without them")
def test_cma_without_the_right_says_so(prefill: Prefill) -> None:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            try:
                # Said when connecting, before a block depends on it: whoever has a choice takes another path then.
                CmaPeer(prefill.metadata["cma"], Region.of(np.zeros(4096, np.uint8)), threads=1)
            except ReadFailed as error:
                code = 0 if error.code == "not_permitted" and "run both as one user" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_memory_that_ends_early_is_an_error_not_a_short_read() -> None:
    memory = mmap.mmap(-1, 8192)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    _libc.munmap(ctypes.c_void_p(address + 4096), ctypes.c_size_t(4096))
    target = np.zeros(8192, np.uint8)
    with pytest.raises(OSError) as failed:
        Vectors(os.getpid(), address, target.ctypes.data)(Plan(*np.array([[0], [0], [8192]])))(0, 1)
    assert failed.value.errno == errno.EFAULT


# --- copying


def test_one_thread_and_several_give_the_same() -> None:
    source = np.random.default_rng(0).integers(0, 255, POOL, np.uint8)
    results = []
    for threads in (1, 3):
        target = np.full(POOL, 0xA5, np.uint8)
        mover = Mover(threads)
        hashes = mover.move(ragged(), LocalCopy(Region.of(source), Region.of(target)), Region.of(target), True)
        mover.close()
        results.append((target, hashes))
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])
    assert np.array_equal(results[0][0], wanted(ragged(), source))


def test_where_seccomp_forbids_vectors_small_pieces_are_copied_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> int:
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(copying, "_readv", forbidden)
    source, target = np.arange(4096, dtype=np.uint8), np.zeros(4096, np.uint8)
    copy = LocalCopy(Region.of(source), Region.of(target))
    copy(Plan(*np.array([[100, 0], [0, 50], [10, 10]])))(0, 2)
    assert target[50:60].tolist() == list(range(10))
    assert target[:10].tolist() == list(range(100, 110))
    assert not copy._vectors


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_way_to_copy_gives_the_same(plan: Plan, threads: int) -> None:
    source = np.random.default_rng(0).integers(0, 255, POOL, np.uint8)
    target = np.full(POOL, 0xA5, np.uint8)
    copy = LocalCopy(Region.of(source), Region.of(target), threads)
    for way in (copy._one_by_one, copy._in_vectors, copy._rows):
        target[:] = 0xA5
        if len(plan) and (step := way(plan)) is not None:
            middle = len(plan) // 2
            step(0, middle)
            step(middle, len(plan))
            assert np.array_equal(target, wanted(plan, source)), way.__name__
    assert copy._rows(PLANS["4 KiB"]) is not None
    assert copy._rows(PLANS["short runs"]) is not None


def test_no_thread_copies_after_an_error(prefill: Prefill) -> None:
    mover, calls = Mover(3), []

    def broken(begin: int, end: int) -> None:
        calls.append(threading.get_ident())
        if len(calls) == 2:
            raise ReadFailed("broken")
        time.sleep(0.01)

    target = np.zeros(POOL, np.uint8)
    with pytest.raises(ReadFailed, match="broken"):
        mover.move(PLANS["1 MiB"], lambda _pieces: broken, Region.of(target), True)
    seen = len(calls)
    time.sleep(0.05)  # time in which a late write could come: there is nothing to wait for
    assert len(calls) == seen
    mover.close()


# --- stream


@pytest.mark.parametrize(
    "who", [identity(key=b"x" * 32), identity(role=Role.PREFILL)], ids=["another key", "another role"]
)
def test_a_stream_is_for_decode_workers_of_this_cluster(prefill: Prefill, who: object) -> None:
    with pytest.raises((AuthenticationFailed, ReadFailed)):
        connect("stream", prefill.metadata["stream"], Region.of(np.zeros(10, np.uint8)), identity=who)


class Proxy:
    """Passes one connection on and flips one bit of what prefill sends, at `at` bytes."""

    def __init__(self, metadata: bytes, at: int) -> None:
        values = json.loads(metadata)
        self._where, self._at = (values["host"], values["port"]), at
        self._server = socket.create_server(("127.0.0.1", 0))
        self.metadata = json.dumps({**values, "port": self._server.getsockname()[1]}).encode()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        near, _ = self._server.accept()
        far = socket.create_connection(self._where)
        threading.Thread(target=self._pump, args=(near, far, -1), daemon=True).start()
        self._pump(far, near, self._at)
        self._server.close()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, at: int) -> None:
        passed = 0
        try:
            while data := bytearray(source.recv(1 << 16)):
                if passed <= at < passed + len(data):
                    data[at - passed] ^= 0x10
                passed += len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


# The welcome is a few hundred bytes, then come headers of about 120 bytes and payload.
@pytest.mark.parametrize("at", [2, 150, 520, 2000, 100_000, 1_500_000])
def test_a_bit_flipped_on_the_way_is_found(prefill: Prefill, at: int) -> None:
    proxy = Proxy(prefill.metadata["stream"], at)
    target = np.zeros(POOL, np.uint8)
    with pytest.raises(TransferError) as found:
        connect("stream", proxy.metadata, Region.of(target), streams=1, patience_s=1.0).read(PLANS["4 KiB"])
    # In the greeting the handshake finds it, in the bytes their hash; between them the MAC of a header.
    assert at > 200 or not isinstance(found.value, ChecksumMismatch)
    assert at < 2000 or isinstance(found.value, ChecksumMismatch)


def test_more_connections_than_allowed_are_closed_at_once(prefill: Prefill) -> None:
    values = json.loads(prefill.metadata["stream"])
    sockets = [socket.create_connection((values["host"], values["port"])) for _ in range(80)]
    sockets[-1].settimeout(5)
    assert sockets[-1].recv(1) == b""
    for sock in sockets:
        sock.close()


def test_a_closed_exporter_serves_nobody() -> None:
    pool = np.zeros(4096, np.uint8)
    exporter = StreamExporter(Region.of(pool), identity(Role.PREFILL), "127.0.0.1")
    target = Region.of(np.zeros(4096, np.uint8))
    peer = connect("stream", exporter.metadata(), target)
    exporter.close()
    assert "kv-stream-send" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(ReadFailed):
        peer.read(blocks(4096, [0], [0]))
    with pytest.raises(ReadFailed, match="port"):
        connect("stream", exporter.metadata(), target)
