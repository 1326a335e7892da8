"""Path `shared`: the pool is a sealed memfd that decode maps read-only. The kernel itself keeps decode from writing.

After prefill has its own mapping the file is sealed (memfd_create(2), fcntl(2)): no new writeable mapping, no
``write``, no ``mprotect`` to writeable, no change of size, and no seal can be taken off, whoever holds a descriptor
and however it was opened. No ptrace right is needed, and if prefill dies the pages live on until decode unmaps them,
so a read in progress ends well.

Pages: hugetlb pages if enough are free; else huge pages of tmpfs. The latter are given on request
(``shmem_enabled`` = advise), and also without it by ``MADV_COLLAPSE`` (madvise(2): independent of the sysfs
settings, Linux 6.1), about 2 s a GiB once at start. What came of it is read from smaps, not assumed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hmac
import json
import logging
import mmap
import os
import re
import secrets
import socket
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pdstack.transfer.backends.base import Exporter
from pdstack.transfer.errors import BackendUnavailable, ReadFailed
from pdstack.transfer.metadata import NBYTES, Text, read_metadata
from pdstack.transfer.paths.base import PathPeer, Region
from pdstack.transfer.paths.copying import THREADS, LocalCopy, Mover
from pdstack.transfer.plan import Plan
from pdstack.transfer.store import Hashes

_log = logging.getLogger(__name__)

_HUGE = 2 << 20
# Of <linux/memfd.h>, <linux/mman.h> and <linux/fcntl.h>; Python has no names for them.
_MFD_HUGE_2MB = 21 << 26
_MAP_NORESERVE, _MAP_FIXED = 0x4000, 0x10
_MADV_COLLAPSE = 25
_F_SEAL_FUTURE_WRITE = 0x10
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE
_FREE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
_ANSWER_S = 5.0

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_mmap.restype = ctypes.c_void_p
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


class _Mapping:
    """A shared mapping at an address that huge pages need: a multiple of 2 MiB, which Python's mmap cannot ask for."""

    def __init__(self, fd: int, nbytes: int, protection: int) -> None:
        self.nbytes = nbytes
        self._reserved = nbytes + _HUGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._start = _mmap(None, self._reserved, 0, flags, -1, 0)
        if self._start == _FAILED:
            raise _error()
        self.address = -(-self._start // _HUGE) * _HUGE
        if _mmap(self.address, nbytes, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) == _FAILED:
            error = _error()
            self.close()
            raise error

    def advise(self, advice: int) -> bool:
        return bool(_madvise(self.address, self.nbytes, advice) == 0)

    def close(self) -> None:
        if self._start is not None:
            _munmap(self._start, self._reserved)
            self._start = None

    def __del__(self) -> None:
        if getattr(self, "_start", None) is not None:
            self.close()

    @property
    def __array_interface__(self) -> dict[str, Any]:
        # An array made from this keeps the mapping alive.
        return {"version": 3, "shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False)}


class Pages(NamedTuple):
    """What a mapping is made of, from /proc/self/smaps: bytes in all, and bytes mapped by huge pages."""

    nbytes: int
    huge: int

    @property
    def kind(self) -> str:
        """``huge``, ``mixed`` or ``small``."""
        return "huge" if self.huge >= self.nbytes else "mixed" if self.huge else "small"


def pages_of(address: int, nbytes: int) -> Pages:
    """The page sizes of one mapping of this process."""
    huge = size = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = int(found[1], 16), int(found[2], 16)
            size = end - begin if address <= begin < address + nbytes else 0
        elif size and line.startswith("KernelPageSize:") and int(line.split()[1]) << 10 >= _HUGE:
            huge += size  # hugetlb: no page of another size can be in it
        elif size and line.startswith("ShmemPmdMapped:"):
            huge += int(line.split()[1]) << 10
    return Pages(nbytes, min(huge, nbytes))


class SharedPool:
    """Memory that prefill writes and others can only read. `array` is all of it as bytes; it keeps the memory alive.

    Raises :class:`BackendUnavailable` where the kernel has no sealed memfd (before Linux 5.1).
    """

    def __init__(self, nbytes: int) -> None:
        if nbytes < 1:
            raise ValueError(f"a pool of {nbytes} bytes, wanted at least 1")
        self.nbytes = nbytes
        self._size = -(-nbytes // _HUGE) * _HUGE
        try:
            self._fd, self._mapping = self._hugetlb() or self._tmpfs()
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)
        except OSError as error:
            raise BackendUnavailable(
                f"a sealed shared pool of {nbytes} bytes cannot be made: {error}; it needs Linux 5.1, and as much free "
                "memory within the container's limit"
            ) from error
        self.array: npt.NDArray[np.uint8] = np.asarray(self._mapping)[:nbytes]
        _log.info("shared KV pool of %d MiB: pages are %s", nbytes >> 20, self.pages().kind)

    def _hugetlb(self) -> tuple[int, _Mapping] | None:
        try:
            if int(_FREE.read_text()) * _HUGE < self._size:
                return None
            flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | os.MFD_HUGETLB | _MFD_HUGE_2MB
            fd = os.memfd_create("pdstack-kv", flags)
        except (OSError, ValueError):
            return None
        try:
            os.ftruncate(fd, self._size)
            # Mapping reserves the pages: if another process was faster, this fails and not a later write.
            return fd, _Mapping(fd, self._size, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:
            os.close(fd)
            return None

    def _tmpfs(self) -> tuple[int, _Mapping]:
        fd = os.memfd_create("pdstack-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, self._size)
            mapping = _Mapping(fd, self._size, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:
            os.close(fd)
            raise
        mapping.advise(mmap.MADV_HUGEPAGE)
        np.asarray(mapping)[::_HUGE] = 0  # collapsing needs one page of each to be there
        if pages_of(mapping.address, self._size).kind != "huge":
            mapping.advise(_MADV_COLLAPSE)
        return fd, mapping

    @property
    def __array_interface__(self) -> dict[str, Any]:
        # An array made from this keeps the descriptor open too, not the memory alone.
        return {**self._mapping.__array_interface__, "shape": (self.nbytes,)}

    def pages(self) -> Pages:
        """What the kernel gave."""
        return pages_of(self._mapping.address, self._size)

    @property
    def region(self) -> Region:
        """The memory in this process."""
        return Region(self._mapping.address, self.nbytes)

    def reader(self) -> int:
        """A new read-only descriptor of the memory, for another process; the caller closes it."""
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "array"):
            self.close()

    def close(self) -> None:
        """Give up the descriptor. The memory is freed with its last mapping: :attr:`array`, and the readers'."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class SharedExporter(Exporter):
    """Hands a read-only descriptor to whoever shows the token, over a unix socket of this host.

    The socket lives in the network namespace (an abstract name), or as a file in `directory` for containers that
    share a directory but no network namespace.
    """

    def __init__(self, pool: SharedPool, directory: str | None = None) -> None:
        self._pool = pool
        self._token = secrets.token_hex(32)
        label = f"pdstack-kv-{secrets.token_hex(16)}"
        self._file = Path(directory) / label if directory is not None else None
        address = f"\0{label}" if self._file is None else str(self._file)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(address)
        if self._file is not None:
            self._file.chmod(0o600)
        self._listener.listen(16)
        self._metadata = json.dumps({"socket": address, "token": self._token, "nbytes": pool.nbytes}).encode()
        self._thread = threading.Thread(target=self._serve, name="kv-shared", daemon=True)
        self._thread.start()

    def metadata(self) -> bytes:
        """The socket's name, the token and the pool's size, as JSON."""
        return self._metadata

    def tend(self) -> None:
        """Nothing to do."""

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            with connection, contextlib.suppress(OSError):
                connection.settimeout(_ANSWER_S)
                shown = connection.recv(64, socket.MSG_WAITALL)
                if hmac.compare_digest(shown, self._token.encode()):
                    fd = self._pool.reader()
                    try:
                        socket.send_fds(connection, [b"k"], [fd])
                    finally:
                        os.close(fd)
                else:
                    _log.warning("a process asked for the shared KV pool without its token and got nothing")

    def close(self) -> None:
        """No process gets the pool any more. Those that have mapped it can still read what is in it."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def receive(metadata: bytes) -> tuple[int, int]:
    """The read-only descriptor of a peer's pool, and its size. Raises :class:`ReadFailed`."""
    # The name of an abstract socket begins with a zero byte.
    values = read_metadata(metadata, "shared", socket=Text(107, also="\0"), token=Text(64), nbytes=NBYTES)
    address, token, nbytes = values["socket"], values["token"], values["nbytes"]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_ANSWER_S)
            connection.connect(address)
            connection.sendall(token.encode())
            _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the middle of a file's name
        raise ReadFailed(
            f"the peer's shared pool cannot be opened: {error}; is the prefill worker on this host, and do both "
            "containers share the network namespace or the socket's directory?"
        ) from error
    if not descriptors:
        raise ReadFailed("the peer refused its shared pool: the token is not its own (it was restarted)")
    return descriptors[0], nbytes


class SharedPeer(PathPeer):
    """One exporter's pool, mapped read-only. Raises :class:`ReadFailed` if it is not sealed as it must be."""

    name = "shared"

    def __init__(self, metadata: bytes, target: Region, threads: int = THREADS) -> None:
        fd, nbytes = receive(metadata)
        try:
            seals, size = fcntl.fcntl(fd, fcntl.F_GET_SEALS), os.fstat(fd).st_size
            if seals & SEALS != SEALS or size < nbytes:
                # Without the seal against shrinking, the peer could end this process with a bus error.
                raise ReadFailed(f"the peer's pool of {size} bytes has seals {seals:#x}, wanted {SEALS:#x}, {nbytes}")
            self._mapping = _Mapping(fd, size, mmap.PROT_READ)
        except OSError as error:
            raise ReadFailed(f"the peer's shared pool cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        self._mapping.advise(mmap.MADV_HUGEPAGE)
        self._nbytes, self._target = nbytes, target
        self._copy = LocalCopy(Region(self._mapping.address, nbytes), target, threads)
        self._mover = Mover(threads)

    def read(self, plan: Plan, *, checksum: bool = True) -> Hashes | None:
        """See the base class. Reads on if the peer dies or is frozen: the memory is this process's too."""
        plan.within(self._nbytes, self._target.nbytes)
        if self._mover.aborted.is_set():
            raise ReadFailed("this shared peer is closed")
        return self._mover.move(plan, self._copy, self._target, checksum)

    @property
    def mapped(self) -> Region:
        """The peer's pool as it is mapped here: to be read, until :meth:`close`."""
        return Region(self._mapping.address, self._nbytes)

    def abort(self) -> None:
        """See the base class."""
        self._mover.aborted.set()

    def close(self) -> None:
        """See the base class."""
        self._mover.close()
        self._mapping.close()
