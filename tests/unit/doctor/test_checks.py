"""Each of the 51 checks passes on one host and does not on another; the facts come from the real probe."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from tests.standins import fakehost

from pdstack.doctor import checks, plan, probe

Facts = dict[str, Any]
GB = 1024
IPC = plan.fabric(
    "nvlink_single", {"transports": ["cuda_ipc"], "pid_mode": "host", "ipc_mode": "host", "scope": "host"}
)
IB = plan.fabric("ib", {"transports": ["rc"], "net_devices": "rdma", "scope": "network"})
TCP = plan.fabric("tcp", {"transports": ["tcp"], "scope": "network"})
CMA = plan.fabric("same_host", {"transports": ["cma"], "pid_mode": "host", "ipc_mode": "host"})
MTU = {"g2": 9000}
XID = "[9.1] NVRM: Xid (PCI:0000:19:00): 79, pid=1, GPU has fallen off the bus."
UNUSED = "[1] UCX  WARN  unused environment variable: UCX_NET_DEVICE (maybe: UCX_NET_DEVICES?)"
WORKER = {"name": "pdstack-a-prefill-0", "deployment": "a", "pid_mode": "host", "ipc_mode": "host", "runtime": "nvidia"}
PORT = {"port": 8000, "service": "frontend", "container": "pdstack-a-frontend", "address": "10.0.0.1", "host": "g1"}
VERSIONS = {"ai-dynamo": "0.7.0.post1", "tensorrt-llm": "1.2.0rc3"}


def wanted(**changes: Any) -> dict[str, Any]:
    """Return the plan of a GPU host with two GPUs."""
    return {
        **plan.empty(), "host": "g1", "address": "10.0.0.1", "deployment": "a", "gpu_host": True, "gpu_count": 2,
        "fabric": IPC, "ports": [PORT], "model_dir": "/models/m", "image_versions": VERSIONS,
        "worker_containers": [WORKER["name"]], **changes,
    }  # fmt: skip


# What is wanted: changes of the plan.
P = wanted
IMAGE = {"transports": ["cuda_ipc", "tcp"], "versions": VERSIONS}


def case(
    number: int, good: Facts, bad: Facts, verdict: str, found: str, plan_: Facts | None = None, **more: Any
) -> Any:
    return pytest.param(number, good, bad, verdict, found, plan_ or {}, more, id=f"{number}-{found[:24]}")


CASES = [
    case(1, {}, {"os": "fedora 42"}, "fail", "fedora 42"),
    case(1, {"os": "rocky 9"}, {"os": "debian 12", "arch": "aarch64"}, "fail", "debian 12 aarch64"),
    case(2, {}, {"gpus": 1, "smi": 9}, "fail", "1"),
    case(3, {}, {"driver": "570.172.08"}, "fail", "570.172.08 is loaded"),
    case(3, {}, {"driver": None}, "fail", "no NVIDIA driver is loaded"),
    case(4, {}, {"loaded": "580.95.05"}, "fail", "loaded 580.95.05, module on disk 580.105.08"),
    case(4, {}, {"library": "580.126.09"}, "fail", "library 580.126.09"),
    case(4, {}, {"library": None}, "fail", "no libnvidia-ml"),
    case(5, {}, {"flavour": "proprietary"}, "warn", "proprietary"),
    case(5, {}, {"flavour": "proprietary"}, "fail", "proprietary", {"fabric": IB}),
    case(6, {}, {"loaded": None}, "fail", "couldn't communicate with the NVIDIA driver"),
    case(6, {}, {"library": None}, "fail", "couldn't find libnvidia-ml.so"),
    case(6, {}, {"loaded": "580.95.05"}, "fail", "Driver/library version mismatch"),
    case(6, {}, {"smi_gpus": 1}, "fail", "1 GPUs"),
    case(6, {}, {"smi_gpus": 4}, "warn", "4 GPUs"),
    case(7, {}, {"nouveau": True}, "fail", "loaded"),
    case(8, {}, {"secure_boot": True, "loaded": None, "key_enrolled": False}, "fail", "not enrolled"),
    case(
        8, {"secure_boot": True, "loaded": None, "signer": "Canonical Ltd. Kernel Module Signing"},
        {"secure_boot": True, "driver": None}, "fail", "made by DKMS",
    ),
    case(9, {}, {"headers": False}, "fail", "no headers of 6.8.0-87-generic"),
    case(9, {"dkms": "", "on_disk": None}, {"dkms": "added"}, "fail", "added"),
    case(10, {}, {"reboot_required": True}, "warn", "the packages ask for one"),
    case(10, {"os": "rocky 9"}, {"os": "rocky 9", "newest_kernel": "5.14.0-999.el9"}, "warn", "5.14.0-999.el9 is"),
    case(11, {}, {"blacklist": []}, "warn", "unattended-upgrades may replace"),
    case(11, {"os": "rocky 9"}, {"os": "rocky 9", "pin": False}, "warn", "not pinned"),
    case(11, {}, {"run_file": True}, "fail", ".run file"),
    case(12, {}, {"persistence": "Disabled"}, "warn", "GPU 0 persistence Disabled"),
    case(12, {"ecc": "[N/A]"}, {"ecc": "3"}, "warn", "GPU 1 3 uncorrected memory errors"),
    case(12, {}, {"compute_mode": "Exclusive_Process"}, "warn", "compute mode Exclusive_Process"),
    case(13, {"nvswitches": 4}, {"nvswitches": 4, "fabric_manager": "580.95.05"}, "fail", "580.95.05, active"),
    case(13, {"nvswitches": 4}, {"nvswitches": 4, "fabric_manager": None}, "fail", "not installed"),
    case(13, {"nvswitches": 4}, {"nvswitches": 4, "fabric_manager_state": "failed"}, "fail", "failed"),
    case(14, {"nvswitches": 4}, {"nvswitches": 4, "fabric": "In Progress, N/A"}, "fail", "GPU 0 In Progress/None"),
    case(15, {}, {"p2p": "CNS"}, "fail", "GPU0-GPU1 CNS"),
    case(15, {}, {"p2p": "CNS"}, "warn", "GPU0-GPU1 CNS", {"fabric": TCP}),
    case(15, {}, {"link": "SYS"}, "fail", "connected by SYS"),
    case(16, {}, {"mig": "Enabled"}, "warn", "GPU 0 Enabled"),
    case(17, {}, {"docker": "20.10.24+dfsg1"}, "fail", "20.10.24"),
    case(17, {}, {"docker": None}, "fail", "not installed"),
    case(17, {}, {"docker": "24.0.7"}, "fail", "24.0.7", {"gpu_request": "cdi"}),
    case(18, {}, {"runtimes": ["runc"], "cdi": False}, "fail", "runtimes runc"),
    case(19, {}, {"daemon_json": "{"}, "fail", "broken: "),
    case(
        19, {"daemon_json": None},
        {"daemon_json": '{"exec-opts": []}', "dockerd_flags": ["--exec-opt=native.cgroupdriver=systemd"]}, "fail",
        "exec-opts: both",
    ),
    case(19, {}, {"daemon_json": '{"hosts": []}'}, "fail", "hosts: both"),
    case(20, {}, {"toolkit": "1.16.2-1"}, "warn", "1.16.2"),
    case(20, {}, {"toolkit": None}, "fail", "not installed"),
    case(20, {}, {"toolkit_packages": {"libnvidia-container1": "1.17.8-1"}}, "warn", "libnvidia-container1 1.17.8-1"),
    case(21, {}, {"stale_cdi": True}, "fail", "stale"),
    case(21, {}, {"cdi": False}, "fail", "none", {"gpu_request": "cdi"}),
    case(22, {"image": IMAGE}, {"image": {**IMAGE, "gpus": 1}}, "fail", "1 GPUs"),
    case(
        22, {"image": IMAGE},
        {"image": {"gpu_error": 'docker: could not select device driver "" with capabilities: [[gpu]].'}}, "fail",
        "could not select device driver",
    ),
    case(23, {}, {"cdi": False}, "warn", "no CDI"),
    case(23, {"cgroup_driver": "cgroupfs", "cdi": False}, {"containers": [WORKER]}, "warn", "pdstack-a-prefill-0"),
    case(24, {}, {"memlock": "8388608"}, "warn", "8388608 of Docker's unit"),
    case(24, {}, {"memlock": "65536"}, "fail", "65536", {"fabric": IB}),
    case(24, {"image": {**IMAGE, "memlock": "unlimited"}}, {"image": {**IMAGE, "memlock": "64"}}, "warn", "64 in a"),
    case(25, {}, {"shm_mib": 64}, "warn", "64 MiB in /dev/shm"),
    case(26, {}, {"disk_mib": 1000}, "fail", "/var/lib/docker 1000 MiB free", {"disk_mib": {"/var/lib/docker": 2000}}),
    case(
        26, {"disk_mib": 5001}, {"disk_mib": 4999}, "fail", "/models/m 4999 MiB free",
        {"disk_mib": {"/var/lib/docker": 2500, "/models/m": 2500}},
    ),
    case(27, {"nics": 1}, {"nics": 1, "nic_state": "DOWN"}, "fail", "mlx5_0:1 DOWN", {"fabric": IB}),
    case(27, {"nics": 1}, {"nics": 1, "uverbs": False}, "fail", "uverbs", {"fabric": IB}),
    case(28, {"nics": 2}, {"nics": 1}, "fail", "there are mlx5_0:1", {"fabric": IB, "net_devices": ["mlx5_1:1"]}),
    case(28, {"nics": 2}, {}, "fail", "no RDMA device", {"fabric": IB, "net_devices": ["mlx5_1:1"]}),
    case(28, {}, {"interfaces": {"ens1": ("10.0.0.1", 1500)}}, "fail", "there are ens1", {"interface": "eth0"}),
    case(
        29, {"nics": 1, "link_layer": "Ethernet"},
        {"nics": 1, "link_layer": "Ethernet", "gid_type": "IB/RoCE v1"}, "fail", "index 3 is IB/RoCE v1",
        {"fabric": IB, "gid_index": "3"},
    ),
    case(30, {"nics": 1}, {"nics": 1, "flavour": "proprietary"}, "fail", "driver proprietary", {"fabric": IB}),
    case(
        30, {"nics": 1, "flavour": "proprietary", "peermem": True, "nv_mem": True}, {"nics": 1, "peermem": True},
        "fail", "loaded but useless", {"fabric": IB},
    ),
    case(
        31, {"ofed": "OFED-internal-25.07-0.9.7", "mlx5_core": "25.07-0.9.7"}, {"ofed": "OFED-internal-25.07-0.9.7"},
        "warn", "mlx5_core of the kernel",
    ),
    case(32, {"gdrdrv": True}, {}, "warn", "no /dev/gdrdrv", {"gdrcopy": True}),
    case(33, {}, {"acs": 2}, "warn", "2 PCI bridges check sources"),
    case(33, {}, {"acs": 1}, "fail", "1 PCI bridges", {"fabric": IB}),
    case(33, {}, {"cmdline": "ro intel_iommu=on"}, "warn", "no iommu=pt"),
    case(34, {"nics": 2}, {"nics": 2, "nic_link": "SYS"}, "warn", "GPU 0 SYS", {"fabric": IB}),
    case(34, {"nics": 1, "smi": 9}, {"nics": 1, "nic_numa": 1, "smi": 9}, "warn", "GPU 0 on NUMA", {"fabric": IB,
         "gpus_used": [0]}),
    case(35, {}, {"interfaces": {"eth0": ("10.0.0.1", 1500)}}, "warn", "eth0 1500; g2 9000", {"peer_mtu": MTU}),
    case(35, {}, {"interfaces": {"eth0": ("10.0.0.1", 1500)}}, "fail", "eth0 1500", {"mtu": 9000}),
    case(36, {"image": IMAGE}, {"image": {**IMAGE, "transports": ["tcp"]}}, "fail", "there are tcp"),
    case(36, {"image": IMAGE}, {"image": {**IMAGE, "complaints": [UNUSED]}}, "fail", "unused environment variable"),
    case(
        37, {"image": {**IMAGE, "perf_mb_s": 150000.0}}, {"image": {**IMAGE, "perf_mb_s": 480.0}}, "warn", "480 MB/s",
        options=["--perf"],
    ),
    case(38, {"containers": [WORKER]}, {"containers": [{**WORKER, "pid_mode": ""}]}, "fail", "pid_mode private"),
    case(39, {}, {"interfaces": {"eth0": ("169.254.3.4", 1500)}}, "fail", "eth0 has none", {"interface": "eth0"}),
    case(39, {"interfaces": {"e0": ("10.0.0.1", 1500)}}, {}, "fail", "there is no e0", {"env_interfaces": ["e0"]}),
    case(39, {}, {"interfaces": {"eth0": ("10.9.9.9", 9000)}}, "fail", "no interface has 10.0.0.1", {"fabric": TCP}),
    case(
        40, {"listeners": [{"port": 8000, "pid": 900}], "containers": [{"name": "x", "pid": 900, "deployment": "a"}]},
        {"listeners": [{"port": 8000, "pid": 900, "process": "nginx"}]}, "fail", "8000 (frontend) by nginx (pid 900)",
    ),
    case(42, {}, {"sysctl": {"net.ipv4.ip_local_port_range": "1024\t65000"}}, "warn", "8000 in 1024-65000"),
    case(
        42,
        {"sysctl": {"net.ipv4.ip_local_port_range": "1024\t65000", "net.ipv4.ip_local_reserved_ports": "8000-8010"}},
        {"sysctl": {"net.ipv4.ip_local_port_range": "1024\t65000"}}, "warn", "8000",
    ),
    case(43, {}, {"sysctl": {"kernel.yama.ptrace_scope": "3"}}, "warn", "ptrace_scope 3"),
    case(43, {}, {"sysctl": {"kernel.yama.ptrace_scope": "2"}}, "fail", "ptrace_scope 2", {"fabric": CMA}),
    case(44, {}, {"sysctl": {"kernel.numa_balancing": "1"}}, "warn", "numa_balancing 1"),
    case(44, {}, {"sysctl": {"vm.max_map_count": "65530"}}, "warn", "max_map_count 65530"),
    case(45, {}, {"synchronized": False}, "warn", "not synchronized"),
    case(45, {}, {"offset_s": 0.3}, "warn", "off by 0.300 s"),
    case(49, {}, {"kernel_log": [XID]}, "warn", "Xid"),
    case(51, {"image": IMAGE}, {"image": {**IMAGE, "versions": {"ai-dynamo": "0.7.0"}}}, "warn", "ai-dynamo 0.7.0"),
]  # fmt: skip


def facts(root: Path, what: Facts, options: list[str]) -> Facts:
    """Return the facts of a fake host, from the real probe, as they come back as JSON."""
    fakehost.make(root, **what)
    words = ["--root", str(root), "--path", "/var/lib/docker", "--path", "/models/m", *options]
    if "image" in what:
        words += ["--image", "runtime:1"]
    found: Facts = json.loads(json.dumps(probe.probe(probe.Host(str(root)), probe.parser().parse_args(words))))
    assert found["errors"] == []
    return found


def one(number: int, found: Facts, plan_: Facts) -> checks.Result:
    return next(result for result in checks.evaluate(found, plan_) if result.number == number)


@pytest.mark.parametrize(("number", "good", "bad", "verdict", "text", "changes", "more"), CASES)
def test_a_check_tells_a_good_host_from_a_bad_one(
    tmp_path: Path, number: int, good: Facts, bad: Facts, verdict: str, text: str, changes: Facts, more: Facts
) -> None:
    options = more.get("options", [])
    right = one(number, facts(tmp_path / "good", good, options), P(**changes))
    assert right.verdict == "ok", right
    assert right.wanted == right.fix == ""
    wrong = one(number, facts(tmp_path / "bad", bad, options), P(**changes))
    assert wrong.verdict == verdict, wrong
    assert text in wrong.found
    assert wrong.wanted and wrong.fix


def served(**changes: Any) -> Facts:
    """Return what the probe says of running services; tests/integration/test_doctor_services.py asks real ones."""
    model = {"exists": True, "uid": 0, "gid": 0, "mode": 0o750, "files": []}
    etcd = {"healthy": True, "error": "", "readable": True, "read_error": "", "fsync_p99_s": 0.004}
    nats = {"answers": True, "error": "", "tls_required": False, "auth_required": True, "jetstream": True}
    return {
        "reach": {"10.0.0.9:2379": changes.get("reach", "ok")},
        "etcd": {"http://10.0.0.1:2379": etcd | changes.get("etcd", {})},
        "nats": {"nats://10.0.0.1:4222": nats | changes.get("nats", {})},
        "paths": {"/models/m": model | changes.get("model", {})},
        "image": None,
    }  # fmt: skip


SERVED = [
    (41, {}, {"reach": "no answer within 3 s"}, "fail", "10.0.0.9:2379: no answer"),
    (41, {"reach": "refused"}, {"reach": "[Errno 113] No route to host"}, "fail", "No route"),
    (46, {}, {"etcd": {"healthy": False, "error": "timed out"}}, "fail", "timed out"),
    (46, {}, {"etcd": {"readable": False, "read_error": "permission denied"}}, "fail", "permission denied"),
    (47, {}, {"nats": {"tls_required": True}}, "fail", "requires TLS"),
    (47, {}, {"nats": {"answers": False, "error": "timed out"}}, "fail", "timed out"),
    (47, {}, {"nats": {"jetstream": False}}, "fail", "no JetStream"),
    (47, {}, {"nats": {"auth_required": False}}, "fail", "lets anyone in"),
    (48, {}, {"etcd": {"fsync_p99_s": 0.064}}, "warn", "64 ms"),
    (50, {}, {"model": {"mode": 0o700}}, "fail", "/models/m"),
    (50, {}, {"model": {"files": [{"name": "w", "uid": 5, "gid": 5, "mode": 0o640}]}}, "fail", "uid 1000 gid 0: w"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "good", "bad", "verdict", "text"), SERVED)
def test_checks_of_what_serves(number: int, good: Facts, bad: Facts, verdict: str, text: str) -> None:
    plan_ = P(etcd_member="http://10.0.0.1:2379", nats_auth=True)
    right = one(number, LIKE_NEW | served(**good), plan_)
    assert right.verdict == "ok", right
    wrong = one(number, LIKE_NEW | served(**bad), plan_)
    assert wrong.verdict == verdict, wrong
    assert text in wrong.found
    assert wrong.wanted and wrong.fix


@pytest.fixture(autouse=True, scope="module")
def like_new(tmp_path_factory: pytest.TempPathFactory) -> None:
    LIKE_NEW.update(facts(tmp_path_factory.mktemp("like") / "new", {}, []))


LIKE_NEW: Facts = {}


def test_every_check_has_a_case_that_passes_and_one_that_does_not() -> None:
    numbers = {param.values[0] for param in CASES} | {row[0] for row in SERVED}
    assert numbers == set(range(1, 52))
    assert [entry.number for entry in checks.CHECKS] == list(range(1, 52))
    assert len({entry.id for entry in checks.CHECKS}) == 51
    assert {entry.stage for entry in checks.CHECKS} == set(checks.STAGES)
    assert {entry.severity for entry in checks.CHECKS} == {"fail", "warn"}


def test_a_good_host_has_nothing_but_ok_and_reasons() -> None:
    results = checks.evaluate(LIKE_NEW, P())
    assert {result.verdict for result in results} == {"ok", "skip"}
    assert all(result.found for result in results)
    assert checks.worst(results) == 0


def test_a_bare_host_is_told_what_the_roles_do(tmp_path: Path) -> None:
    found = facts(
        tmp_path / "bare", {"driver": None, "docker": None, "toolkit": None, "persistence": "", "cdi": False}, []
    )
    results = checks.evaluate(found, P())
    failed = {result.id: result.mended_by for result in results if result.verdict == "fail"}
    assert failed == {
        "driver_version": "gpu_driver", "nvidia_smi": "gpu_driver", "docker": "container_engine",
        "toolkit": "nvidia_toolkit",
    }  # fmt: skip
    assert {result.verdict for result in checks.evaluate(found, P(), stages=["bare"])} <= {"ok", "skip"}
    assert checks.worst(results) == 2


def test_what_no_role_mends_is_known_on_the_bare_host(tmp_path: Path) -> None:
    plan_ = P(fabric=IB, net_devices=["mlx5_9:1"])
    missing = one(28, facts(tmp_path / "a", {"nics": 1}, []), plan_)
    assert (missing.stage, missing.mended_by) == ("bare", "")
    found = facts(tmp_path / "b", {"nics": 1}, [])
    found["rdma"]["devices"] = []
    without_driver = one(28, found, plan_)
    assert (without_driver.stage, without_driver.mended_by) == ("provisioned", "rdma")


def test_hosts_without_gpus_are_not_asked_for_gpus() -> None:
    results = checks.evaluate(LIKE_NEW, {**plan.empty(), "ports": [PORT]})
    told = {result.id for result in results if result.verdict == "ok"}
    assert {"os", "docker", "daemon_json", "disk", "ports", "port_range", "time"} <= told
    assert all(result.found == "not a GPU host" for result in results if result.id in ("nvidia_smi", "p2p", "cdi"))


@pytest.mark.parametrize(
    ("number", "what", "stage", "role"),
    [
        (6, {"smi_gpus": 1}, "bare", ""),
        (6, {"loaded": None}, "provisioned", "gpu_driver"),
        (12, {"persistence": "Disabled"}, "provisioned", "gpu_driver"),
        (12, {"persistence": "Disabled", "ecc": "2"}, "bare", ""),
    ],
)
def test_only_what_a_role_mends_is_said_to_be_mended(
    tmp_path: Path, number: int, what: Facts, stage: str, role: str
) -> None:
    result = one(number, facts(tmp_path / "host", what, []), P())
    assert (result.verdict != "ok", result.stage, result.mended_by) == (True, stage, role)


def test_what_a_role_may_not_mend_is_in_the_way_of_a_deployment(tmp_path: Path) -> None:
    found = facts(tmp_path / "host", {"driver": None}, [])
    result = one(3, found, P(unmanaged=["gpu_driver"]))
    assert (result.verdict, result.stage, result.mended_by) == ("fail", "bare", "")
    assert result.fix.endswith("gpu_driver__manage is off for this host")
    assert one(3, LIKE_NEW, P(unmanaged=["gpu_driver"])).stage == "provisioned"


def test_the_reference_engine_needs_ptrace_for_cma(tmp_path: Path) -> None:
    found = facts(tmp_path / "host", {"sysctl": {"kernel.yama.ptrace_scope": "2"}}, [])
    assert one(43, found, {**plan.empty(), "fabric": CMA}).verdict == "fail"
    assert one(43, found, plan.empty()).verdict == "skip"


def test_an_unlisted_system_may_be_allowed(tmp_path: Path) -> None:
    found = facts(tmp_path / "host", {"os": "fedora 42"}, [])
    assert one(1, found, P(allow_unlisted_os=True)).verdict == "warn"


def test_a_path_where_dynamo_wants_the_text_of_a_certificate() -> None:
    result = one(46, LIKE_NEW, P(env={"ETCD_AUTH_CA": "/etc/ssl/ca.pem"}))
    assert (result.verdict, result.stage) == ("fail", "bare")
    assert one(46, LIKE_NEW, P(env={"ETCD_AUTH_CA": "-----BEGIN CERTIFICATE-----"})).verdict == "skip"


def test_services_that_do_not_run_yet_are_no_failure() -> None:
    refused = {"healthy": False, "error": "[Errno 111] Connection refused", "readable": None, "fsync_p99_s": None}
    found = LIKE_NEW | served(etcd=refused, nats={"answers": False, "error": "[Errno 111] Connection refused"})
    assert [one(number, found, P()).verdict for number in (46, 47)] == ["skip", "skip"]


def test_stages_and_ids_choose() -> None:
    assert [result.id for result in checks.evaluate(LIKE_NEW, P(), ids=["disk", "os"])] == ["os", "disk"]
    assert {result.stage for result in checks.evaluate(LIKE_NEW, P(), stages=["image"])} == {"image"}
    with pytest.raises(ValueError, match="no such check: dsk"):
        checks.evaluate(LIKE_NEW, P(), ids=["dsk"])
    with pytest.raises(ValueError, match="no such stage: early"):
        checks.evaluate(LIKE_NEW, P(), stages=["early"])


@pytest.mark.parametrize("name", ["checks", "plan", "report", "__main__"])
def test_an_older_python_can_read_it(name: str) -> None:
    ast.parse((Path(checks.__file__).parent / f"{name}.py").read_text(), feature_version=(3, 9))


FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.json"))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_facts_of_a_real_host_can_be_judged(path: Path) -> None:
    found = json.loads(path.read_text())
    assert found["errors"] == []
    results = checks.evaluate(found, plan.default(found))
    assert [result.number for result in results] == list(range(1, 52))
    told = {result.id: result for result in results}
    assert told["driver_version"].verdict == "ok", told["driver_version"]
    assert told["driver_equal"].verdict == "ok", told["driver_equal"]
    assert told["nvidia_smi"].verdict == "ok", told["nvidia_smi"]
    assert told["gpu_health"].verdict in ("ok", "warn")
    assert "H100" in told["nvidia_smi"].found
