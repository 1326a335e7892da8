"""Why a pair is slow or on another transport: what is observed on made-up roots, and what is concluded from it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pdstack.transfer.qualify.causes import Question, allows, causes
from pdstack.transfer.qualify.facts import Facts, observe

SAME = Facts(
    host="a", boot="b1", cores=8, load=0.1, namespaces={"pid": 1, "ipc": 2, "net": 3}, readv="ok", thp="madvise"
)
OTHER = dataclasses.replace(SAME, host="b", boot="b2")


def put(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A container on a host with an RDMA port, as the kernel shows it."""
    put(tmp_path, "proc/self/status", "Name:\tx\nCapEff:\t0000000000084000\nSeccomp:\t2\n")
    put(tmp_path, "proc/sys/kernel/random/boot_id", "1234\n")
    put(tmp_path, "proc/sys/kernel/yama/ptrace_scope", "1\n")
    put(tmp_path, "proc/loadavg", "3.50 1.0 1.0 1/2 3\n")
    put(tmp_path, "sys/fs/cgroup/cpu.max", "150000 100000\n")
    put(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n")
    put(tmp_path, "sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size [advise] never\n")
    for name, state, mtu in (("lo", "unknown", 65536), ("eth0", "up", 1500), ("eth1", "down", 9000)):
        put(tmp_path, f"sys/class/net/{name}/operstate", f"{state}\n")
        put(tmp_path, f"sys/class/net/{name}/mtu", f"{mtu}\n")
    put(tmp_path, "sys/class/infiniband/mlx5_0/ports/1/state", "1: DOWN\n")
    for number, name in enumerate(("pid", "ipc", "net", "user")):
        (tmp_path / "proc/self/ns").mkdir(exist_ok=True)
        (tmp_path / "proc/self/ns" / name).symlink_to(f"{name}:[402653183{number}]")
    (tmp_path / "dev/shm").mkdir(parents=True)
    return tmp_path


def test_what_the_kernel_shows_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    found = observe(root, "small")
    assert found.boot == "1234" and found.load == 3.5 and found.cpu_quota == 1.5
    assert (found.ptrace_scope, found.seccomp, found.sys_ptrace, found.ipc_lock) == (1, 2, True, True)
    assert (found.thp, found.shmem_thp, found.pool_pages) == ("never", "advise", "small")
    assert found.mtu == {"eth0": 1500}
    assert found.rdma_ports == {"mlx5_0:1": "1: DOWN"} and not found.rdma_devices
    assert found.namespaces["net"] == 4026531832
    assert found.shm and found.ucx["UCX_TLS"] == "tcp"
    assert Facts.parse(json.loads(json.dumps(found.as_json()))) == found


def test_where_the_kernel_shows_nothing_nothing_is_claimed(tmp_path: Path) -> None:
    found = observe(tmp_path)
    assert (found.boot, found.ptrace_scope, found.seccomp, found.shm, found.mtu) == ("", None, None, None, {})


def test_this_host_shows_itself() -> None:
    found = observe()
    assert found.boot and found.namespaces["pid"] and found.shm and found.readv


def question(wanted: str, found: str, prefill: Facts = SAME, **decode: Any) -> Question:
    return Question(prefill, dataclasses.replace(SAME, **decode), wanted, found)


CASES = [
    ("two hosts", Question(SAME, OTHER, "cma", "tcp"), "decode on b"),
    ("pid namespace", question("cma", "tcp", namespaces={"pid": 9}), "namespace 1, decode in 9"),
    ("ipc namespace", question("sysv", "tcp", namespaces={"ipc": 9}), "namespace 2, decode in 9"),
    ("net namespace", question("shared", "stream", namespaces={"net": 9}), "namespace 3, decode in 9"),
    ("user", question("cma", "stream", user=1000), "prefill runs as user 0, decode as user 1000"),
    ("ptrace scope", question("cma", "tcp", ptrace_scope=1), "ptrace_scope is 1"),
    ("seccomp", question("cma", "tcp", readv="EPERM", seccomp=2), "ends with EPERM; its seccomp mode is 2"),
    ("UCX_TLS", question("cma", "tcp", ucx={"UCX_TLS": "tcp,self"}), "decode has UCX_TLS=tcp,self"),
    ("UCX_TLS", question("rc", "tcp", dataclasses.replace(SAME, ucx={"UCX_TLS": "^ib"})), "prefill has UCX_TLS=^ib"),
    ("UCX_CMA_MEMORY_INVALIDATE", question("cma", "tcp", ucx={"UCX_CMA_MEMORY_INVALIDATE": "n"}), "decode has it off"),
    ("UCX_NET_DEVICES", question("rc", "tcp", ucx={"UCX_NET_DEVICES": "mlx5_7:1"}), "names mlx5_7:1 and has only lo"),
    ("no RDMA port", question("rc_mlx5", "tcp"), "decode sees none"),
    ("no RDMA device", question("rc", "tcp", rdma_ports={"mlx5_0:1": "4: ACTIVE"}), "decode has no /dev/infiniband"),
    (
        "RDMA port down",
        question("rc", "tcp", rdma_ports={"mlx5_0:1": "1: DOWN"}, rdma_devices=True),
        "mlx5_0:1 is 1: DOWN",
    ),
    ("memlock", question("rc", "tcp", memlock=8 << 20), "may lock 8 MiB"),
    ("small /dev/shm", question("posix", "tcp", shm=64 << 20), "/dev/shm of 64 MiB"),
    ("small pages", question("", "shared", dataclasses.replace(SAME, pool_pages="small")), "has small pages"),
    ("small pages", question("", "cma", dataclasses.replace(SAME, thp="never")), "are off"),
    ("MTU", Question(SAME, dataclasses.replace(OTHER, mtu={"eth0": 1500}), "", "tcp"), "eth0 has 1500"),
    ("CPU quota", question("", "shared", cpu_quota=1.5), "may use 1.5 cores"),
    ("busy host", question("", "shared", load=9.0), "load was 9.0 on 8 cores"),
]


@pytest.mark.parametrize(("name", "asked", "evidence"), CASES)
def test_a_cause_is_found_with_its_evidence_and_a_fix(name: str, asked: Question, evidence: str) -> None:
    found = [cause for cause in causes(asked) if cause.name == name and evidence in cause.evidence]
    assert len(found) == 1 and found[0].fix


def test_healthy_hosts_have_no_causes() -> None:
    for transport in ("shared", "cma", "stream", "tcp"):
        assert causes(question(transport, transport)) == []


@pytest.mark.parametrize(
    "asked",
    [
        question("shared", "cma", load=99.0, cpu_quota=0.5),
        question("", "", load=99.0),
        question("cma", "tcp", namespaces={}, ptrace_scope=1, sys_ptrace=True, user=7),
        question("cma", "tcp", ptrace_scope=0, readv="ok", ucx={"UCX_TLS": "cma,tcp"}),
        question("shared", "stream", namespaces={"net": 3}, memlock=1),
        Question(SAME, dataclasses.replace(OTHER, ptrace_scope=1, mtu={"eth0": 9000}), "stream", "tcp"),
        question("rc", "rc", memlock=1, ipc_lock=True),
    ],
)
def test_what_does_not_matter_is_not_named(asked: Question) -> None:
    assert causes(asked) == []


@pytest.mark.parametrize(
    ("value", "transport", "allowed"),
    [
        ("all", "cma", True),
        ("tcp", "cma", False),
        ("tcp,cma,self", "cma", True),
        ("sm,self", "cma", True),
        ("shm", "posix", True),
        ("^sm", "cma", False),
        ("^tcp", "cma", True),
        ("^tcp", "tcp", False),
        ("rc", "rc_mlx5", True),
        ("rc_x", "rc_mlx5", False),
        ("ib", "dc_mlx5", True),
        ("^ib", "ud", False),
        ("rc:aux,tcp", "rc", True),
    ],
)
def test_ucx_tls_is_understood(value: str, transport: str, allowed: bool) -> None:
    assert allows(value, transport) is allowed
