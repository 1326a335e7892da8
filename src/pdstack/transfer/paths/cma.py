"""Path `cma`: the kernel copies out of the memory of a process that keeps its pool to itself, 1,024 extents a call.

UCX and NIXL make one ``process_vm_readv`` call a descriptor (4 to 5 us each); batching is what small blocks gain from.
The right to read is the right to ptrace: same user, same PID namespace, and no Yama or seccomp rule against it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
from pathlib import Path

import numpy as np

from pdstack.transfer.backends.base import Exporter
from pdstack.transfer.errors import ReadFailed
from pdstack.transfer.metadata import ADDRESS, NBYTES, Kind, Text, Whole, read_metadata
from pdstack.transfer.paths.base import PathPeer, Region
from pdstack.transfer.paths.copying import THREADS, Mover, Vectors
from pdstack.transfer.plan import Plan, merge
from pdstack.transfer.store import Hashes

_FIELDS: dict[str, Kind] = {
    "pid": Whole(1, (1 << 31) - 1),
    "started": Text(20),
    "namespace": ADDRESS,
    "boot": Text(36),
    "base": ADDRESS,
    "nbytes": NBYTES,
}


def _started(pid: int) -> str:
    """When a process started, in ticks since boot (proc(5), field 22): with its number, one process for ever."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def _boot() -> str:
    """This host's boot id (random(4)). PID namespaces do not tell hosts apart: the first of each has one number."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class CmaExporter(Exporter):
    """Says where the pool is. Nothing runs here: the kernel serves the readers."""

    def __init__(self, pool: Region) -> None:
        pid = os.getpid()
        values = {"boot": _boot(), "pid": pid, "started": _started(pid), "namespace": _namespace()}
        self._metadata = json.dumps({**values, "base": pool.address, "nbytes": pool.nbytes}).encode()

    def metadata(self) -> bytes:
        """Boot id of the host, process number and start time, PID namespace, the pool's address and size, as JSON."""
        return self._metadata

    def tend(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to let go of: the pool's owner frees it. Readers are told by the control channel."""


class CmaPeer(PathPeer):
    """One process whose pool is read. Raises :class:`ReadFailed` if it is gone or cannot be seen."""

    name = "cma"

    def __init__(self, metadata: bytes, target: Region, threads: int = THREADS) -> None:
        values = read_metadata(metadata, "cma", **_FIELDS)
        self._pid, started, namespace = values["pid"], values["started"], values["namespace"]
        self._base, self._nbytes, boot = values["base"], values["nbytes"], values["boot"]
        if boot != _boot():
            raise ReadFailed(
                f"process {self._pid} runs on another host (boot id {boot:.36}, here {_boot()}): cma reads on one host "
                "only, take the path stream or the backend",
                code="not_permitted",
            )
        if namespace != _namespace():
            raise ReadFailed(
                f"process {self._pid} lives in PID namespace {namespace}, this one in {_namespace()}: run both "
                "containers in the host's PID namespace (pid: host), or take the path shared",
                code="not_permitted",
            )
        try:
            self._pidfd = os.pidfd_open(self._pid)
            if _started(self._pid) != started:
                os.close(self._pidfd)
                raise ProcessLookupError(errno.ESRCH, "its number is another process's now")
        except OSError as error:
            raise self._failed(error) from error
        try:
            # One byte: the right to read is known before any block depends on it.
            probe = np.zeros(1, np.uint8)
            Vectors(self._pid, self._base, probe.ctypes.data)(merge([0], [0], [1]))(0, 1)
        except OSError as error:
            os.close(self._pidfd)
            raise self._failed(error) from error
        self._target = target
        self._copy = Vectors(self._pid, self._base, target.address)
        self._mover = Mover(threads)

    def read(self, plan: Plan, *, checksum: bool = True) -> Hashes | None:
        """See the base class."""
        plan.within(self._nbytes, self._target.nbytes)
        if self._mover.aborted.is_set():
            raise ReadFailed("this cma peer is closed")
        try:
            hashes = self._mover.move(plan, self._copy, self._target, checksum)
        except OSError as error:
            raise self._failed(error) from error
        if self._gone():
            # Its number may have passed to another process during the read: those bytes could be anyone's.
            raise self._failed(ProcessLookupError(errno.ESRCH, "it ended during the read"))
        return hashes

    def _gone(self) -> bool:
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(0))

    def _failed(self, error: OSError) -> ReadFailed:
        about = f"process {self._pid} of the prefill worker"
        if error.errno == errno.ESRCH:
            return ReadFailed(f"{about} is gone: {error}", code="peer_gone")
        if error.errno in (errno.EPERM, errno.EACCES):
            return ReadFailed(f"{about} may not be read: {error}; {_why_forbidden(self._pid)}", code="not_permitted")
        return ReadFailed(f"the kernel could not read from {about}: {error}")

    def abort(self) -> None:
        """See the base class."""
        self._mover.aborted.set()

    def close(self) -> None:
        """See the base class."""
        self._mover.close()
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)


def _why_forbidden(pid: int) -> str:
    """What stands in the way of ptrace access, as far as it can be seen."""
    with contextlib.suppress(OSError):
        owner = Path(f"/proc/{pid}").stat().st_uid
        if owner not in (os.geteuid(), 0) or (owner == 0 and os.geteuid() != 0):
            return f"it runs as user {owner}, this one as {os.geteuid()}: run both as one user"
    with contextlib.suppress(OSError, ValueError):
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
        if scope:
            return f"kernel.yama.ptrace_scope is {scope}, wanted 0: set it, or give the container SYS_PTRACE"
    return "give the container SYS_PTRACE and a seccomp profile that allows process_vm_readv, or take the path shared"
