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

import numpy as np
import numpy.typing as npt

from pdstack.transfer.errors import ReadFailed
from pdstack.transfer.paths.base import HASH_UNIT, Hashes, Region, aborted, hash_pieces
from pdstack.transfer.plan import Offsets, Plan, ranges, split

# What one thread copies before it looks for more work, or whether it was told to stop.
_UNHASHED_UNIT = 4 << 20
# Below this many bytes a piece, what a call from Python costs shows beside the copy.
_SHORT = 16 << 10
_SHORTEST_ROW = 512
# The kernel's limit on vectors (UIO_MAXIOV).
_MAX_VECTORS = 1024
# Two threads saturate what two memory channels give; more contend for the interpreter lock between copies.
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

Copy = Callable[[Offsets, Offsets, Offsets], None]


def read_process(pid: int, source: Offsets, target: Offsets, nbytes: Offsets) -> None:
    """Copy pieces from addresses `source` of process `pid` to addresses `target` of this one, 1,024 a call.

    Raises OSError with the kernel's reason; EFAULT too if the other process's memory ends before a piece does.
    """
    vectors = np.empty((2, len(nbytes), 2), np.uint64)  # struct iovec: address, length
    vectors[0, :, 0], vectors[1, :, 0], vectors[:, :, 1] = target, source, nbytes
    local, remote = vectors[0].ctypes.data, vectors[1].ctypes.data
    for first in range(0, len(nbytes), _MAX_VECTORS):
        many = min(_MAX_VECTORS, len(nbytes) - first)
        done = _readv(pid, local + 16 * first, many, remote + 16 * first, many, 0)
        if done < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        if done != int(nbytes[first : first + many].sum()):
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))


class LocalCopy:
    """Copies between two regions of this process, in the way that costs least for pieces of their length.

    Long pieces go one by one. Short ones go as rows of two tables if they are whole rows, which numpy's indexing
    copies without the interpreter; else as vectors of one call into the kernel.
    """

    def __init__(self, source: Region, target: Region) -> None:
        self._source, self._target = source, target
        self._vectors = True

    def __call__(self, source: Offsets, target: Offsets, nbytes: Offsets) -> None:
        """Copy pieces between offsets of the two regions."""
        if int(nbytes.sum()) < _SHORT * len(nbytes) and (
            self._as_rows(source, target, nbytes) or self._as_vectors(source, target, nbytes)
        ):
            return
        addresses = (target + self._target.address).tolist(), (source + self._source.address).tolist()
        deque(map(_memmove, *addresses, nbytes.tolist()), maxlen=0)

    def _as_rows(self, source: Offsets, target: Offsets, nbytes: Offsets) -> bool:
        row = int(nbytes[0])
        if (nbytes != row).any() or (source % row).any() or (target % row).any():
            row = int(np.gcd.reduce(np.concatenate((source, target, nbytes))))  # merged runs of equal blocks
        if row % 8 or row < _SHORTEST_ROW:
            return False
        counts = nbytes // row
        begins, ends = ranges(source // row, counts), ranges(target // row, counts)
        here, there = _table(self._target, row), _table(self._source, row)
        step = max(1, HASH_UNIT // row)  # what numpy holds between the two tables stays in the cache
        for first in range(0, len(begins), step):
            here[ends[first : first + step]] = there[begins[first : first + step]]
        return True

    def _as_vectors(self, source: Offsets, target: Offsets, nbytes: Offsets) -> bool:
        if self._vectors:
            try:
                # A process may always read itself, and the kernel's loop runs without the interpreter lock.
                read_process(os.getpid(), source + self._source.address, target + self._target.address, nbytes)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOSYS):
                    raise ReadFailed(f"a copy inside this process failed: {error}") from error
                self._vectors = False  # a seccomp filter: one call a piece does the same, slower
        return self._vectors


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
        unit = HASH_UNIT if checksum else _UNHASHED_UNIT
        pieces = split(plan, unit)
        hashes = np.zeros(len(pieces), np.uint64) if checksum else None
        memory = target.bytes()
        edges = _edges(pieces.nbytes, unit)
        turns = count()
        failed = Event()

        def work() -> None:
            while (turn := next(turns)) + 1 < len(edges) and not failed.is_set():
                if self.aborted.is_set():
                    raise aborted()
                mine = slice(edges[turn], edges[turn + 1])
                copy(pieces.source[mine], pieces.target[mine], pieces.nbytes[mine])
                if hashes is not None:
                    hashes[mine] = hash_pieces(memory, pieces.target[mine], pieces.nbytes[mine])

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
    if not len(nbytes):
        return [0]
    share = (np.cumsum(nbytes) - 1) // unit
    return [0, *(np.flatnonzero(np.diff(share)) + 1).tolist(), len(nbytes)]
