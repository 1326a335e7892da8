"""Why a pair is below its floor, or on another transport than it should be: what the facts of both ends say.

Each check is a function of the facts that returns causes with their evidence and fix, so only what was seen on these
hosts is named. Checks of permission come before those of speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pdstack.transfer.qualify.facts import Facts

_MIB = 1 << 20
_SHARED_MEMORY = ("cma", "posix", "sysv", "xpmem", "knem")
_RDMA = ("rc", "rc_mlx5", "rc_verbs", "dc", "dc_mlx5", "ud", "ud_mlx5", "ud_verbs")


@dataclass(frozen=True)
class Cause:
    """One thing that was found: its short name, what shows it, and what to change."""

    name: str
    evidence: str
    fix: str


@dataclass(frozen=True)
class Question:
    """What is asked: the two ends, what should carry KV ("" for no wish), and what does ("" for nothing)."""

    prefill: Facts
    decode: Facts
    wanted: str
    found: str

    @property
    def one_host(self) -> bool:
        """True if both ends run on one kernel."""
        return bool(self.prefill.boot) and self.prefill.boot == self.decode.boot

    @property
    def missed(self) -> bool:
        """True if another transport than the wanted one is used."""
        return bool(self.wanted) and self.wanted != self.found

    @property
    def slow(self) -> bool:
        """True if the right transport is used, so that only its speed can be in question."""
        return bool(self.found) and not self.missed

    def ends(self) -> Iterator[tuple[str, Facts]]:
        """Both ends with their names."""
        yield "prefill", self.prefill
        yield "decode", self.decode

    def misses(self, *transports: str) -> bool:
        """True if one of these is wanted, and is not what is found."""
        return self.missed and self.wanted in transports


Check = Callable[[Question], Iterator[Cause]]


def _hosts(question: Question) -> Iterator[Cause]:
    if question.misses("shared", *_SHARED_MEMORY) and not question.one_host:
        yield Cause(
            "two hosts",
            f"prefill runs on {question.prefill.host} (boot {question.prefill.boot[:8]}), decode on "
            f"{question.decode.host} (boot {question.decode.boot[:8]})",
            "place both on one host, or name a transport between hosts in the profile",
        )


def _pid_namespace(question: Question) -> Iterator[Cause]:
    if question.one_host and question.misses("cma"):
        yield from _namespace(question, "pid", "run both containers with pid: host, or take the path shared")


def _ipc_namespace(question: Question) -> Iterator[Cause]:
    if question.one_host and question.misses("sysv", "posix"):
        yield from _namespace(question, "ipc", "run both containers with ipc: host")


def _net_namespace(question: Question) -> Iterator[Cause]:
    if question.one_host and question.misses("shared"):
        fix = "run both containers with network_mode: host, or give the exporter a directory that both have"
        yield from _namespace(question, "net", fix)


def _namespace(question: Question, kind: str, fix: str) -> Iterator[Cause]:
    mine, theirs = (facts.namespaces.get(kind) for facts in (question.decode, question.prefill))
    if mine is not None and theirs is not None and mine != theirs:
        yield Cause(f"{kind} namespace", f"prefill is in {kind} namespace {theirs}, decode in {mine}", fix)


def _user(question: Question) -> Iterator[Cause]:
    mine, theirs = question.decode.user, question.prefill.user
    if question.one_host and question.misses("cma") and mine != theirs and not question.decode.sys_ptrace:
        yield Cause("user", f"prefill runs as user {theirs}, decode as user {mine}", "run both as one user")


def _ptrace_scope(question: Question) -> Iterator[Cause]:
    scope = question.decode.ptrace_scope
    if question.one_host and question.misses("cma") and scope and not question.decode.sys_ptrace:
        yield Cause(
            "ptrace scope",
            f"kernel.yama.ptrace_scope is {scope}, and decode lacks the capability SYS_PTRACE",
            "sysctl kernel.yama.ptrace_scope=0, or cap_add: SYS_PTRACE for the decode container",
        )


def _seccomp(question: Question) -> Iterator[Cause]:
    facts = question.decode
    if question.one_host and question.misses("cma") and facts.readv not in ("", "ok"):
        yield Cause(
            "seccomp",
            f"process_vm_readv of decode's own memory ends with {facts.readv}; its seccomp mode is {facts.seccomp}",
            "give the decode container a seccomp profile that allows process_vm_readv",
        )


def _ucx_tls(question: Question) -> Iterator[Cause]:
    for end, facts in question.ends():
        value = facts.ucx.get("UCX_TLS", "")
        if question.misses("cma", "tcp", *_SHARED_MEMORY, *_RDMA) and value and not allows(value, question.wanted):
            yield Cause(
                "UCX_TLS",
                f"{end} has UCX_TLS={value}, which leaves out {question.wanted}",
                f"add {question.wanted} to UCX_TLS of the {end} workers, or unset it",
            )
    if question.misses("cma"):
        for end, facts in question.ends():
            if facts.ucx.get("UCX_CMA_MEMORY_INVALIDATE", "y").lower() in ("n", "no", "0", "off"):
                yield Cause(
                    "UCX_CMA_MEMORY_INVALIDATE",
                    f"{end} has it off, and UCX leaves out cma where a lost peer must be an error",
                    "unset it, or set it to y",
                )


def allows(value: str, transport: str) -> bool:
    """Whether a UCX_TLS of `value` lets UCX choose `transport` (its aliases: sm and shm, rc, ud, dc, ib, all)."""
    refused = value.startswith("^")
    named = {word.strip().partition(":")[0].lstrip("\\") for word in value.removeprefix("^").split(",")}
    names = {transport, transport.partition("_")[0]}
    if transport in _SHARED_MEMORY:
        names |= {"sm", "shm"}
    if transport in _RDMA:
        names |= {"ib"}
    return not named & names if refused else bool(named & (names | {"all"}))


def _net_devices(question: Question) -> Iterator[Cause]:
    for end, facts in question.ends():
        value = facts.ucx.get("UCX_NET_DEVICES", "all")
        if value == "all" or value.startswith("^"):
            continue
        there = {"lo", *facts.mtu, *facts.rdma_ports}
        missing = [name for name in value.split(",") if name not in there and f"{name}:1" not in there]
        if missing and question.missed:
            yield Cause(
                "UCX_NET_DEVICES",
                f"{end} names {', '.join(missing)} and has only {', '.join(sorted(there))}",
                "name devices of this host, in the form mlx5_0:1 or eth0",
            )


def _rdma_ports(question: Question) -> Iterator[Cause]:
    if not question.misses(*_RDMA):
        return
    for end, facts in question.ends():
        if not facts.rdma_ports:
            yield Cause("no RDMA port", f"{end} sees none in /sys/class/infiniband", "load the NIC's driver")
        elif not facts.rdma_devices:
            yield Cause("no RDMA device", f"{end} has no /dev/infiniband", "devices: /dev/infiniband for the container")
        elif not any("ACTIVE" in state for state in facts.rdma_ports.values()):
            states = ", ".join(f"{port} is {state}" for port, state in facts.rdma_ports.items())
            yield Cause("RDMA port down", f"{end}: {states}", "check the cable, the switch and the subnet manager")


def _memlock(question: Question) -> Iterator[Cause]:
    for end, facts in question.ends():
        if question.wanted in _RDMA and facts.memlock is not None and not facts.ipc_lock:
            yield Cause(
                "memlock",
                f"{end} may lock {facts.memlock / _MIB:.0f} MiB and lacks IPC_LOCK; RDMA locks the whole pool",
                "ulimits: memlock: -1 for the container",
            )


def _shm(question: Question) -> Iterator[Cause]:
    for end, facts in question.ends():
        if question.misses("posix") and facts.shm is not None and facts.shm <= 64 * _MIB:
            yield Cause(
                "small /dev/shm",
                f"{end} has a /dev/shm of {facts.shm / _MIB:.0f} MiB",
                "shm_size: 1g or more for the container, or ipc: host",
            )


def _huge_pages(question: Question) -> Iterator[Cause]:
    facts = question.prefill
    if not question.one_host or not question.slow:
        return
    if question.found == "shared" and facts.pool_pages in ("small", "mixed"):
        yield Cause(
            "small pages",
            f"prefill's shared pool has {facts.pool_pages} pages (shmem_enabled is {facts.shmem_thp or 'unknown'})",
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, or reserve vm.nr_hugepages",
        )
    elif question.found == "cma" and facts.thp == "never":
        yield Cause(
            "small pages",
            "transparent huge pages are off on prefill's host, and the kernel pins each page of a read",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )


def _mtu(question: Question) -> Iterator[Cause]:
    if question.one_host or not question.slow or question.found not in ("stream", "tcp"):
        return
    for end, facts in question.ends():
        small = {name: mtu for name, mtu in facts.mtu.items() if mtu < 9000}
        if small and len(small) == len(facts.mtu):
            shown = ", ".join(f"{name} has {mtu}" for name, mtu in small.items())
            yield Cause("MTU", f"{end}: {shown}", "use an MTU of 9000 on the KV network, on hosts and switch alike")


def _quota(question: Question) -> Iterator[Cause]:
    for end, facts in question.ends() if question.slow else ():
        if facts.cpu_quota is not None and facts.cpu_quota < 2:
            yield Cause(
                "CPU quota",
                f"the control group of {end} may use {facts.cpu_quota:.1f} cores",
                "give the worker 2 cores or more: copying pays with two threads",
            )


def _busy(question: Question) -> Iterator[Cause]:
    if not question.slow:
        return
    for end, facts in [("both", question.decode)] if question.one_host else question.ends():
        if facts.load is not None and facts.load > facts.cores:
            yield Cause(
                "busy host",
                f"on the host of {end} the load was {facts.load:.1f} on {facts.cores} cores before the measurement",
                "measure again when nothing else runs there",
            )


CHECKS: tuple[Check, ...] = (
    _hosts,
    _pid_namespace,
    _ipc_namespace,
    _net_namespace,
    _user,
    _ptrace_scope,
    _seccomp,
    _ucx_tls,
    _net_devices,
    _rdma_ports,
    _memlock,
    _shm,
    _huge_pages,
    _mtu,
    _quota,
    _busy,
)


def causes(question: Question) -> list[Cause]:
    """All that the checks find, the likeliest first; empty if nothing that they know is wrong. The same once only."""
    return list(dict.fromkeys(cause for check in CHECKS for cause in check(question)))
