"""What the process of a worker can see of its surroundings that decides which KV path works and how fast.

Observed where the worker will run, because containers differ: namespaces, capabilities, limits, devices. Nothing is
judged here; :mod:`pdstack.transfer.qualify.causes` does that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import re
import resource
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_CAP_SYS_PTRACE, _CAP_IPC_LOCK = 19, 14


def _fits(value: Any, kind: str) -> bool:
    """True if a value from JSON is of this type, one of those that :class:`Facts` has."""
    if kind.startswith("dict"):
        inner = kind.removesuffix("]").rpartition(" ")[2]
        return isinstance(value, dict) and all(_fits(each, inner) for each in value.values())
    if value is None:
        return kind.endswith("None")
    types = {"str": str, "int": int, "bool": bool, "float": int | float}
    return isinstance(value, types[kind.partition(" ")[0]]) and isinstance(value, bool) == (kind == "bool")


@dataclass(frozen=True)
class Facts:
    """One process's surroundings; None or empty where the kernel does not say. Sizes in bytes."""

    host: str = ""
    boot: str = ""
    kernel: str = ""
    pid: int = 0
    user: int = 0
    cores: int = 0
    load: float | None = None
    cpu_quota: float | None = None
    namespaces: dict[str, int] = field(default_factory=dict)
    ptrace_scope: int | None = None
    seccomp: int | None = None
    sys_ptrace: bool = False
    ipc_lock: bool = False
    readv: str = ""
    memlock: int | None = None
    shm: int | None = None
    thp: str = ""
    shmem_thp: str = ""
    mtu: dict[str, int] = field(default_factory=dict)
    rdma_ports: dict[str, str] = field(default_factory=dict)
    rdma_devices: bool = False
    ucx: dict[str, str] = field(default_factory=dict)
    pool_pages: str = ""

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Facts:
        """From what :meth:`as_json` gave; fields that this version does not know are left out.

        Raises ValueError for a field of another type.
        """
        if not isinstance(values, dict):
            raise ValueError(f"facts are {type(values).__name__}, wanted an object")
        known = {name: each.type for name, each in cls.__dataclass_fields__.items() if name in values}
        for name, kind in known.items():
            if not _fits(values[name], str(kind)):
                raise ValueError(f"{name} is {values[name]!r:.80}, wanted {kind}")
        return cls(**{name: values[name] for name in known})

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def observe(root: Path = Path("/"), pool_pages: str = "") -> Facts:
    """Look around. `root` is where /proc, /sys and /dev are; limits, user and cores are always this process's own."""

    def text(path: str) -> str:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (root / path).read_text().strip()
        return ""

    def number(path: str) -> int | None:
        return int(found) if (found := text(path)).isdigit() else None

    status = dict(re.findall(r"^(\w+):\s*(\S+)$", text("proc/self/status"), re.MULTILINE))
    capabilities = int(status.get("CapEff", "0"), 16)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    load = text("proc/loadavg").split()
    return Facts(
        host=platform.node(),
        boot=text("proc/sys/kernel/random/boot_id"),
        kernel=platform.release(),
        pid=os.getpid(),
        user=os.geteuid(),
        cores=len(os.sched_getaffinity(0)),
        load=float(load[0]) if load else None,
        cpu_quota=_quota(text("sys/fs/cgroup/cpu.max")),
        namespaces=_namespaces(root / "proc/self/ns"),
        ptrace_scope=number("proc/sys/kernel/yama/ptrace_scope"),
        seccomp=int(status["Seccomp"]) if status.get("Seccomp", "").isdigit() else None,
        sys_ptrace=bool(capabilities >> _CAP_SYS_PTRACE & 1),
        ipc_lock=bool(capabilities >> _CAP_IPC_LOCK & 1),
        readv=_readv(),
        memlock=None if soft == resource.RLIM_INFINITY else soft,
        shm=_size(root / "dev/shm"),
        thp=_chosen(text("sys/kernel/mm/transparent_hugepage/enabled")),
        shmem_thp=_chosen(text("sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        mtu=_mtu(root / "sys/class/net"),
        rdma_ports=_rdma(root / "sys/class/infiniband"),
        rdma_devices=(root / "dev/infiniband").is_dir(),
        ucx={name: value for name, value in sorted(os.environ.items()) if name.startswith("UCX_")},
        pool_pages=pool_pages,
    )


def _quota(text: str) -> float | None:
    """Cores that the control group may use (cgroup v2: "quota period" in microseconds, or "max")."""
    parts = text.split()
    return int(parts[0]) / int(parts[1]) if len(parts) == 2 and parts[0].isdigit() else None


def _namespaces(folder: Path) -> dict[str, int]:
    found = {}
    for name in ("pid", "ipc", "net", "user"):
        with contextlib.suppress(OSError, ValueError):
            found[name] = int(re.sub(r"\D", "", str((folder / name).readlink())))
    return found


def _readv() -> str:
    """How ``process_vm_readv`` of this very process ends: "ok" or an errno. Only a seccomp filter forbids it."""
    byte = (ctypes.c_char * 1)(b"k")
    target = (ctypes.c_char * 1)()
    vectors = [(ctypes.c_size_t * 2)(ctypes.addressof(buffer), 1) for buffer in (target, byte)]
    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.process_vm_readv
    call.restype = ctypes.c_ssize_t
    if call(os.getpid(), vectors[0], ctypes.c_ulong(1), vectors[1], ctypes.c_ulong(1), ctypes.c_ulong(0)) == 1:
        return "ok"
    return errno.errorcode.get(ctypes.get_errno(), "failed")


def _size(folder: Path) -> int | None:
    with contextlib.suppress(OSError):
        found = os.statvfs(folder)
        return found.f_frsize * found.f_blocks
    return None


def _chosen(text: str) -> str:
    """The word in brackets of a kernel setting like "always [madvise] never"."""
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else ""


def _mtu(folder: Path) -> dict[str, int]:
    """Of every interface that is up, but for loopback."""
    found = {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        with contextlib.suppress(OSError, ValueError):
            if entry.name != "lo" and (entry / "operstate").read_text().strip() in ("up", "unknown"):
                found[entry.name] = int((entry / "mtu").read_text())
    return found


def _rdma(folder: Path) -> dict[str, str]:
    """Device:port and the state of its port, such as "4: ACTIVE"."""
    found = {}
    for state in sorted(folder.glob("*/ports/*/state")):
        with contextlib.suppress(OSError):
            found[f"{state.parts[-4]}:{state.parts[-2]}"] = state.read_text().strip()
    return found
