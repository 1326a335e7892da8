"""Carries out a plan by copying, in several threads, and hashes each piece while it is in the cache."""

from __future__ import annotations

import ctypes
import errno
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import count
from threading import Event
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pdstack.transfer.errors import ReadFailed
from pdstack.transfer.paths.base import Region, aborted, hash_spans
from pdstack.transfer.plan import Offsets, Plan, ranges, split
from pdstack.transfer.store import HASH_UNIT, Hashes

# What one thread copies before it looks for more work, or whether it was told to stop: much where nothing is hashed;
# little where short pieces are, so that they are still in the shared cache; one piece where they are long.
_UNHASHED_SHARE = 4 << 20
_SHORT_SHARE = 1 << 20
# Where threads share the work, pieces shorter than this go in calls that each move many: a call of its own takes the
# interpreter lock twice a piece, and the threads wait for each other.
_MANY_A_CALL = 256 << 10
# One thread alone waits for nobody, and gains from many a call only where the copy is as short as the call.
_MANY_A_CALL_ALONE = 16 << 10
# Up to this length numpy's indexing is cheaper than the kernel's vectors, which pin each page.
_ROW_AT_MOST, _ROW_AT_LEAST = 8 << 10, 512
# The kernel's limit on vectors (UIO_MAXIOV).
_MAX_VECTORS = 1024
# Two threads saturate what two memory channels give.
THREADS = max(1, min(2, len(os.sched_getaffinity(0))))

_libc = ctypes.CDLL(None, use_errno=True)
_memmove = _libc.memmove  # ctypes releases the interpreter lock during the call
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memmove.restype = None
_readv = _libc.process_vm_readv
_readv.argtypes = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_readv.restype = ctypes.c_ssize_t

Step = Callable[[int, int], None]


class Copy(Protocol):
    """A way to copy: made ready once for a plan's pieces, it then copies pieces `begin` to `end` of them."""

    def __call__(self, pieces: Plan) -> Step:
        """All that is the same for every share of the pieces is done here, once."""


class Vectors:
    """Copies from a process by the kernel's vectors, up to 1,024 pieces a call. `pid` may be this very process.

    The steps raise OSError with the kernel's reason; EFAULT too if the other process's memory ends before a piece does.
    """

    def __init__(self, pid: int, source: int, target: int) -> None:
        self._pid, self._source, self._target = pid, source, target

    def __call__(self, pieces: Plan) -> Step:
        """See :class:`Copy`."""
        vectors = np.empty((2, len(pieces), 2), np.uint64)  # struct iovec: address, length
        vectors[0, :, 0], vectors[1, :, 0] = pieces.target + self._target, pieces.source + self._source
        vectors[:, :, 1] = pieces.nbytes
        marks = [0, *np.cumsum(pieces.nbytes).tolist()]

        def step(begin: int, end: int) -> None:
            local, remote = vectors[0].ctypes.data, vectors[1].ctypes.data
            for first in range(begin, end, _MAX_VECTORS):
                last = min(first + _MAX_VECTORS, end)
                done = _readv(self._pid, local + 16 * first, last - first, remote + 16 * first, last - first, 0)
                if done < 0:
                    code = ctypes.get_errno()
                    raise OSError(code, os.strerror(code))
                if done != marks[last] - marks[first]:
                    raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))

        return step


class LocalCopy:
    """Copies between two regions of this process, in the way that costs least for the pieces of a plan."""

    def __init__(self, source: Region, target: Region, threads: int = THREADS) -> None:
        self._source, self._target, self._threads = source, target, threads
        self._vectors = True

    def __call__(self, pieces: Plan) -> Step:
        """See :class:`Copy`."""
        many = _MANY_A_CALL if self._threads > 1 else _MANY_A_CALL_ALONE
        if pieces.total >= many * len(pieces):
            return self._one_by_one(pieces)
        return self._rows(pieces) or self._in_vectors(pieces)

    def _one_by_one(self, pieces: Plan) -> Step:
        target, source = pieces.target + self._target.address, pieces.source + self._source.address
        lists = target.tolist(), source.tolist(), pieces.nbytes.tolist()

        def step(begin: int, end: int) -> None:
            deque(map(_memmove, *(values[begin:end] for values in lists)), maxlen=0)

        return step

    def _rows(self, pieces: Plan) -> Step | None:
        """Pieces as rows of two tables, if they are whole rows; runs of several blocks are several rows."""
        if pieces.total > _ROW_AT_MOST * len(pieces):
            return None
        row = int(pieces.nbytes.min())
        if any((values % row).any() for values in (pieces.nbytes, pieces.source, pieces.target)):
            row = int(np.gcd.reduce(np.concatenate((pieces.source, pieces.target, pieces.nbytes))))
        if row % 8 or row < _ROW_AT_LEAST:
            return None
        counts = pieces.nbytes // row
        sources, targets = ranges(pieces.source // row, counts), ranges(pieces.target // row, counts)
        here, there = _table(self._target, row), _table(self._source, row)
        marks = [0, *np.cumsum(counts).tolist()]

        def step(begin: int, end: int) -> None:
            mine = slice(marks[begin], marks[end])
            here[targets[mine]] = there[sources[mine]]

        return step

    def _in_vectors(self, pieces: Plan) -> Step:
        # A process may always read itself, and the kernel's loop runs without the interpreter lock.
        vectors = Vectors(os.getpid(), self._source.address, self._target.address)(pieces)
        plain = self._one_by_one(pieces)

        def step(begin: int, end: int) -> None:
            if self._vectors:
                try:
                    return vectors(begin, end)
                except OSError as error:
                    if error.errno not in (errno.EPERM, errno.ENOSYS):
                        raise ReadFailed(f"a copy inside this process failed: {error}") from error
                    self._vectors = False  # a seccomp filter: one call a piece does the same, slower
            return plain(begin, end)

        return step


def _table(region: Region, row: int) -> npt.NDArray[np.uint64]:
    """The whole rows of a region. Words, because numpy lets other threads run while it copies numbers."""
    memory = region.bytes()[: region.nbytes // row * row]
    return np.frombuffer(memory, np.uint64).reshape(-1, row // 8)


class Mover:
    """The threads of one peer. :meth:`move` returns, or raises, only when none of them copies any more."""

    def __init__(self, threads: int = THREADS) -> None:
        if threads < 1:
            raise ValueError(f"{threads} copying threads, wanted at least 1")
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="kv-copy") if threads > 1 else None
        self.aborted = Event()

    def move(self, plan: Plan, copy: Copy, target: Region, checksum: bool) -> Hashes | None:
        """Carry out `plan` with `copy`; hashes as :meth:`PathPeer.read` says."""
        if not len(plan):
            return np.zeros(0, np.uint64) if checksum else None
        pieces = split(plan, HASH_UNIT if checksum else _UNHASHED_SHARE)
        hashes = np.zeros(len(pieces), np.uint64) if checksum else None
        memory = target.bytes()
        long = pieces.total >= len(pieces) * HASH_UNIT // 2
        edges = _edges(pieces.nbytes, _UNHASHED_SHARE if not checksum else HASH_UNIT if long else _SHORT_SHARE)
        ends = (pieces.target + pieces.nbytes).tolist() if checksum else []
        begins = pieces.target.tolist() if checksum else []
        step = copy(pieces)
        turns = count()
        failed = Event()

        def work() -> None:
            while (turn := next(turns)) + 1 < len(edges) and not failed.is_set():
                if self.aborted.is_set():
                    raise aborted()
                begin, end = edges[turn], edges[turn + 1]
                step(begin, end)
                if hashes is not None:
                    hashes[begin:end] = hash_spans(memory, begins[begin:end], ends[begin:end])

        helpers = min(self._threads, len(edges) - 1) - 1
        others = [self._pool.submit(work) for _ in range(helpers)] if self._pool is not None else []
        try:
            work()
        except BaseException:
            failed.set()
            raise
        finally:
            # Whatever ended our own share, the others' must end too before the target is given back.
            wait(others)
        for other in others:
            other.result()
        return hashes

    def close(self) -> None:
        """End the threads."""
        self.aborted.set()
        if self._pool is not None:
            self._pool.shutdown()


def _edges(nbytes: Offsets, unit: int) -> list[int]:
    """Where to cut the pieces into shares of about `unit` bytes: indices from 0 to their number."""
    share = (np.cumsum(nbytes) - 1) // unit
    return [0, *(np.flatnonzero(np.diff(share)) + 1).tolist(), len(nbytes)]
