from __future__ import annotations

import ast
import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.standins import fakehost

from pdstack.doctor import probe

Host = Callable[..., dict[str, Any]]
KEYS = {
    "os", "pci", "driver", "packages", "reboot_required", "fabric_manager", "docker", "toolkit", "rdma", "gdrcopy",
    "net", "listeners", "limits", "sysctl", "shm_mib", "memory", "disk", "time", "iommu", "kernel_log",
}  # fmt: skip


def test_python_3_6_can_read_it() -> None:
    source = Path(probe.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 6))
    assert "from __future__" not in source
    # Python 3.6 has neither of them.
    words = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    assert not words & {"capture_output", "text", "missing_ok", "strict"}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


def test_it_runs_from_standard_input_without_the_package(tmp_path: Path) -> None:
    root = fakehost.make(tmp_path / "host")
    done = subprocess.run(
        [sys.executable, "-I", "-", "--root", str(root)], input=Path(probe.__file__).read_text(), capture_output=True,
        text=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout)["driver"]["loaded"] == fakehost.DRIVER


def test_this_machine_can_be_asked() -> None:
    done = subprocess.run(
        [sys.executable, probe.__file__, "--path", "/nonexistent/deep"], capture_output=True, check=True
    )
    found = json.loads(done.stdout)
    assert set(found) >= KEYS
    assert found["errors"] == []
    assert found["disk"]["/nonexistent/deep"] > 0
    assert 0 < found["memory"]["available_mib"] <= found["memory"]["total_mib"]
    assert "127.0.0.1" in next(entry for entry in found["net"]["interfaces"] if entry["name"] == "lo")["addresses"]


def test_an_empty_tree_is_a_host_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = subprocess.run(
        [sys.executable, probe.__file__, "--root", str(tmp_path)], capture_output=True, check=True, timeout=60
    )
    found = json.loads(done.stdout)
    assert found["errors"] == []
    assert set(found) >= KEYS
    assert found["driver"]["loaded"] is found["driver"]["library"] is None
    assert found["memory"] == {"total_mib": None, "available_mib": None}


def test_it_writes_nothing(tmp_path: Path) -> None:
    root = fakehost.make(tmp_path / "host", gpus=8, nvswitches=4, nics=8)
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in root.rglob("*"))
    subprocess.run([sys.executable, probe.__file__, "--root", str(root)], stdout=subprocess.DEVNULL, check=True)
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in root.rglob("*")) == before


def test_os_and_pci(host: Host) -> None:
    found = host(os="debian 12", gpus=8, nvswitches=4, nics=2)
    assert (found["os"]["id"], found["os"]["version"], found["os"]["codename"]) == ("debian", "12", "bookworm")
    assert found["os"]["kernel"] == found["os"]["newest_kernel"] == "6.1.0-40-amd64"
    assert [len(found["pci"][kind]) for kind in ("gpus", "nvswitches", "nics")] == [8, 4, 2]
    assert {gpu["numa"] for gpu in found["pci"]["gpus"]} == {0, 1}
    assert not found["os"]["virtual"]


def test_three_versions_of_the_driver(host: Host) -> None:
    driver = host(loaded="580.95.05", on_disk="580.105.08", library="580.105.08")["driver"]
    assert (driver["loaded"], driver["on_disk"], driver["library"]) == ("580.95.05", "580.105.08", "580.105.08")
    assert driver["flavour"] == "open"
    assert driver["nvidia_smi"]["rc"] == 18
    assert "Driver/library version mismatch" in driver["nvidia_smi"]["text"]
    assert driver["dkms"] == ["nvidia/580.105.08, 6.8.0-87-generic, x86_64: installed"]


@pytest.mark.parametrize(
    ("what", "status", "text"),
    [
        ({"loaded": None}, 9, "couldn't communicate with the NVIDIA driver"),
        ({"library": None}, 12, "couldn't find libnvidia-ml.so"),
        ({"driver": None}, None, ""),
    ],
)
def test_failures_of_nvidia_smi(host: Host, what: dict[str, Any], status: int | None, text: str) -> None:
    smi = host(**what)["driver"]["nvidia_smi"]
    assert smi["rc"] == status
    assert text in smi["text"]
    assert smi["gpus"] == []


def test_flavour_is_told_by_the_module_on_disk_when_none_is_loaded(host: Host) -> None:
    assert host(loaded=None)["driver"]["flavour"] == "open"
    assert host(loaded=None, flavour="proprietary")["driver"]["flavour"] == "proprietary"
    assert host(driver=None)["driver"]["flavour"] == ""


@pytest.mark.parametrize("state", [True, False, None])
def test_secure_boot_is_read_from_the_firmware(host: Host, state: bool | None) -> None:
    assert host(secure_boot=state)["driver"]["secure_boot"] is state


def test_enrolled_key(host: Host) -> None:
    assert host(secure_boot=True, key_enrolled=True)["driver"]["key_enrolled"] is True
    assert host(secure_boot=True, key_enrolled=False)["driver"]["key_enrolled"] is False
    assert host(secure_boot=True)["driver"]["key_enrolled"] is None


def test_gpus_and_how_they_are_connected(host: Host) -> None:
    smi = host(gpus=4, nvswitches=2, nics=4, ecc="[N/A]", link="NV12")["driver"]["nvidia_smi"]
    assert smi["rc"] == 0
    assert [gpu["index"] for gpu in smi["gpus"]] == [0, 1, 2, 3]
    assert smi["gpus"][0] == {
        "index": 0, "uuid": "GPU-00000000-8c6f-0000-0000-000000000000", "name": "NVIDIA H100 80GB HBM3",
        "memory_mib": 81559, "persistence": "Enabled", "ecc": None, "compute_mode": "Default", "mig": "Disabled",
        "bus_id": "00000000:19:00.0", "fabric_state": "Completed", "fabric_status": "Success",
    }  # fmt: skip
    assert smi["topology"]["GPU0"] == {
        "GPU0": "X", "GPU1": "NV12", "GPU2": "NV12", "GPU3": "NV12", "NIC0": "PIX", "NIC1": "SYS", "NIC2": "SYS",
        "NIC3": "SYS",
    }  # fmt: skip
    assert smi["nics"] == {f"NIC{i}": f"mlx5_{i}" for i in range(4)}
    assert smi["p2p"]["GPU3"] == {"GPU0": "OK", "GPU1": "OK", "GPU2": "OK", "GPU3": "X"}


def test_matrix_of_a_terminal() -> None:
    text = "\t\x1b[4mGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\nGPU0\t X \tSYS\t0-15\t0\t\tN/A\n"
    assert probe.topology_matrix(text) == {"GPU0": {"GPU0": "X", "GPU1": "SYS"}}


def test_a_driver_that_knows_no_fabric_fields_is_asked_without_them(tmp_path: Path) -> None:
    tree = fakehost.Tree(tmp_path)
    row = "0, GPU-1, NVIDIA H100 80GB HBM3, 81559, Enabled, 0, Default, Disabled, 00000000:19:00.0"
    tree.program(
        "nvidia-smi",
        'case "$*" in *fabric*) echo \'Field "fabric.state" is not a valid field to query.\'; exit 2;; esac\n'
        f"echo '{row}'",
    )
    found = probe.smi_facts(probe.Host(str(tmp_path)), switches=True)
    assert (found["rc"], found["gpus"][0]["fabric_state"]) == (0, None)


def test_packages_of_apt(host: Host) -> None:
    found = host(holds=["docker-ce"], blacklist=["^nvidia-", "^cuda-"], run_file=True)["packages"]
    assert found["manager"] == "apt"
    assert found["installed"]["nvidia-dkms-580-open"] == "580.105.08-0ubuntu1"
    assert found["holds"] == ["docker-ce"]
    assert found["blacklist"] == ["^nvidia-", "^cuda-"]
    assert found["pin_file"] and found["run_file_install"]
    assert found["sources"] == [
        "/etc/apt/sources.list.d/cuda.list: deb file:/srv/mirror/cuda/ /",
        "/etc/apt/sources.list.d/debian.sources: URIs: http://deb.debian.org/debian",
    ]


def test_packages_of_dnf(host: Host) -> None:
    found = host(
        os="rocky 9", holds=["nvidia-driver-3:580.105.08-1.el9.*"], newest_kernel="5.14.0-611.5.1.el9_7.x86_64"
    )
    assert found["packages"]["manager"] == "dnf"
    assert found["packages"]["installed"]["docker-ce"] == "5:28.3.3-1~ubuntu.24.04~noble"
    assert found["packages"]["module_stream"] == "580-open"
    assert found["packages"]["holds"] == ["nvidia-driver-3:580.105.08-1.el9.*"]
    assert found["packages"]["pin_file"]
    assert found["reboot_required"] is True


def test_passwords_of_package_sources_stay_on_the_host(tmp_path: Path) -> None:
    fakehost.Tree(tmp_path).file("etc/apt/sources.list", "deb https://me:secret@mirror.example/debian bookworm main\n")
    sources = probe.package_sources(probe.Host(str(tmp_path)))
    assert sources == ["/etc/apt/sources.list: deb https://mirror.example/debian bookworm main"]


def test_a_package_that_was_removed_is_not_installed() -> None:
    text = "Package: nvidia-utils-570\nStatus: deinstall ok config-files\nVersion: 570.1-1\n\n"
    assert probe.dpkg_packages(text) == ({}, [])


def test_a_comment_blacklists_nothing() -> None:
    text = 'Unattended-Upgrade::Package-Blacklist {\n//  "linux-";\n  "^nvidia-";\n};\n'
    text += 'Unattended-Upgrade::Package-Blacklist:: "^cuda-";\n'
    assert probe.apt_blacklist(text) == ["^nvidia-", "^cuda-"]


def test_fabric_manager(host: Host) -> None:
    found = host(nvswitches=4, fabric_manager="580.95.05", fabric_manager_state="failed")["fabric_manager"]
    assert (found["unit"], found["version"], found["state"]) == ("nvidia-fabricmanager.service", "580.95.05", "failed")
    assert host()["fabric_manager"]["unit"] == ""


def test_engine_and_toolkit(host: Host) -> None:
    found = host(
        stale_cdi=True, memlock="8388608", dockerd_flags=["-H", "fd://", "--exec-opt=native.cgroupdriver=systemd"]
    )
    docker = found["docker"]
    assert (docker["version"], docker["cgroup_driver"], docker["cgroup_version"]) == ("28.3.3", "systemd", "2")
    assert "nvidia" in docker["runtimes"]
    assert docker["daemon_json"]["runtimes"]["nvidia"]["path"] == "nvidia-container-runtime"
    assert docker["unit_flags"] == ["-H", "--exec-opt"]
    assert docker["cdi"] and docker["cdi_devices"][0] == "nvidia.com/gpu=all"
    assert found["toolkit"]["version"] == "1.20.0"
    assert set(found["toolkit"]["packages"].values()) == {"1.20.0-1"}
    assert found["toolkit"]["stale_cdi"]
    assert found["limits"]["memlock"] == 8388608


def test_broken_daemon_json(host: Host) -> None:
    docker = host(daemon_json='{"runtimes": ')["docker"]
    assert docker["daemon_json"] is None
    assert "Expecting value" in docker["daemon_json_error"]
    assert host(daemon_json="[]")["docker"]["daemon_json_error"] == "it is no JSON object"


def test_no_engine(host: Host) -> None:
    docker = host(docker=None)["docker"]
    assert (docker["installed"], docker["version"], docker["runtimes"]) == (False, None, [])


def test_listeners_with_their_containers(host: Host) -> None:
    found = host(
        listeners=[
            {"port": 8000, "pid": 4100, "parent": 4000, "process": "python3"},
            {"port": 5555, "pid": 700, "process": "nv-hostengine", "hex": "0100007F"},
        ],
        containers=[{"name": "pdstack-a-frontend", "pid": 4000, "deployment": "a", "pid_mode": "host"}],
    )
    nobody = {"container": "", "deployment": ""}
    assert found["listeners"] == [
        {"address": "127.0.0.1", "port": 5555, "pid": 700, "process": "nv-hostengine", **nobody},
        {
            "address": "0.0.0.0", "port": 8000, "pid": 4100, "process": "python3", "container": "pdstack-a-frontend",
            "deployment": "a",
        },
    ]  # fmt: skip
    assert found["docker"]["containers"][0]["pid_mode"] == "host"


def test_the_owner_of_a_real_socket_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = probe.listener_facts(probe.Host("/"), [])
        port = server.getsockname()[1]
    assert next(entry for entry in found if entry["port"] == port)["pid"] == os.getpid()


def test_without_ip_the_kernel_tells_the_first_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.Host, "program", lambda self, name: None)
    found = probe.interface_facts(probe.Host("/"))
    assert next(entry for entry in found if entry["name"] == "lo")["addresses"] == ["127.0.0.1"]


def test_a_library_in_an_unusual_place_is_found_by_the_loader(tmp_path: Path) -> None:
    tree = fakehost.Tree(tmp_path)
    tree.file("opt/nv/libnvidia-ml.so.580.1.2")
    tree.link("opt/nv/libnvidia-ml.so.1", "libnvidia-ml.so.580.1.2")
    tree.program("ldconfig", "echo '\tlibnvidia-ml.so.1 (libc6,x86-64) => /opt/nv/libnvidia-ml.so.1'")
    assert probe.library_versions(probe.Host(str(tmp_path))) == ["580.1.2"]


def test_rdma(host: Host) -> None:
    found = host(nics=2, link_layer="Ethernet", ofed="OFED-internal-25.07-0.9.7", mlx5_core="25.07-0.9.7", peermem=True)
    rdma = found["rdma"]
    assert rdma["devices"][1] == {
        "name": "mlx5_1", "port": 1, "state": "ACTIVE", "link_layer": "Ethernet", "netdev": "ens1np0", "numa": 1,
        "rate": "400 Gb/sec (4X NDR)",
        "gids": {
            "0": {"gid": "fe80:0000:0000:0000:a088:c203:00b1:0002", "type": "IB/RoCE v1"},
            "1": {"gid": "fe80:0000:0000:0000:a088:c203:00b1:0002", "type": "RoCE v2"},
            "2": {"gid": "0000:0000:0000:0000:0000:ffff:0a00:0002", "type": "IB/RoCE v1"},
            "3": {"gid": "0000:0000:0000:0000:0000:ffff:0a00:0002", "type": "RoCE v2"},
        },
    }  # fmt: skip
    assert (rdma["ofed"], rdma["mlx5_core"], rdma["mlx5_core_on_disk"]) == (
        "OFED-internal-25.07-0.9.7", "25.07-0.9.7", "25.07-0.9.7",
    )  # fmt: skip
    assert rdma["peermem"] and rdma["dmabuf"] and rdma["uverbs"] and not rdma["nv_mem"]


def test_dmabuf_needs_open_modules_and_a_kernel(host: Host) -> None:
    assert not host(flavour="proprietary")["rdma"]["dmabuf"]
    assert not host(kernel="5.4.0-200-generic")["rdma"]["dmabuf"]
    assert host(kernel="5.14.0-570.el9.x86_64")["rdma"]["dmabuf"]


def test_rest_of_the_machine(host: Host) -> None:
    found = host("--path", "/models", gdrdrv=True, acs=1, disk_mib=5000, shm_mib=64, memory_mib=2048, offset_s=-0.2)
    assert found["gdrcopy"] == {"device": True, "module": "2.5.1"}
    assert found["iommu"]["acs_on"] == 1
    assert found["disk"] == {"/models": 5000}
    assert found["shm_mib"] == 64
    assert found["memory"] == {"total_mib": 2048, "available_mib": 1843}
    assert found["time"] == {"synchronized": True, "offset_s": 0.2}
    assert found["sysctl"]["vm.max_map_count"] == "1048576"
    assert found["net"]["interfaces"][0] == {"name": "eth0", "mtu": 9000, "state": "up", "addresses": ["10.0.0.1"]}


def test_kernel_log_keeps_what_concerns_gpus(host: Host) -> None:
    lines = ["[1.0] usb 1-1: new device", "[9.1] NVRM: Xid (PCI:0000:19:00): 79, pid=1, GPU has fallen off the bus."]
    assert host(kernel_log=lines)["kernel_log"] == [lines[1]]


def test_what_containers_of_an_image_see(host: Host) -> None:
    image = {
        "gpus": 2, "uid": 1000, "gid": 0, "memlock": "64", "versions": {"ai-dynamo": "0.7.0.post1", "nixl": "0.7.1"},
        "transports": ["tcp", "cuda_ipc"], "perf_mb_s": 1234.5,
        "complaints": ["[1] UCX  WARN  unused environment variable: UCX_NET_DEVICE (maybe: UCX_NET_DEVICES?)"],
    }  # fmt: skip
    found = host("--image", "runtime:1", "--perf", "--run-option=--gpus=all", image=image)["image"]
    assert (found["gpus"]["count"], found["uid"], found["gid"], found["memlock"]) == (2, 1000, 0, "64")
    assert found["versions"] == {"ai-dynamo": "0.7.0.post1", "nixl": "0.7.1"}
    assert found["ucx"]["transports"] == ["cuda_ipc", "tcp"]
    assert found["ucx"]["complaints"] == image["complaints"]
    assert found["perf_mb_s"] == 1234.5
    assert host()["image"] is None
    assert host("--image", "runtime:1")["image"] == {"ref": "runtime:1", "present": False}


def test_a_program_that_hangs_is_given_up(tmp_path: Path) -> None:
    fakehost.Tree(tmp_path).program("slow", "exec sleep 60")
    assert probe.Host(str(tmp_path)).run("slow", timeout_s=0.2) == (124, "", "no answer within 0.2 s")


def test_a_fact_that_cannot_be_read_does_not_take_the_others_with_it() -> None:
    found = probe.together({"bad": lambda: 1 // 0, "good": lambda: 1})
    assert (found["bad"], found["good"]) == (None, 1)
    assert "ZeroDivisionError" in found["errors"][0]


def test_reach_tells_a_refusal_from_an_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = f"127.0.0.1:{server.getsockname()[1]}"
        assert probe.reach(target) == "ok"
    assert probe.reach(target) == "refused"


def test_fake_hosts_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="gpu_count"):
        fakehost.make(tmp_path, gpu_count=2)


def test_real_areas_of_a_fake_host(tmp_path: Path) -> None:
    root = fakehost.make(tmp_path / "host", real=["proc/meminfo", "proc/net"])
    assert (root / "proc/meminfo").readlink() == Path("/proc/meminfo")
    assert (root / "proc/net").readlink() == Path("/proc/net")


def image_of_this_environment(tmp_path: Path) -> probe.Host:
    """Return a host whose `docker run` runs the command here, where the real UCX is."""
    spec = importlib.util.find_spec("libucx")
    assert spec and spec.origin
    ucx = Path(spec.origin).parent
    fakehost.Tree(tmp_path).program(
        "docker",
        'case "$1" in image) echo sha256:1; exit;; esac\n'
        'while [ $# -gt 0 ]; do case "$1" in\n'
        '  --env) export "$2"; shift;;\n'
        f"  -c) export LD_LIBRARY_PATH={ucx}/lib PATH={ucx}/bin:{Path(sys.executable).parent}:$PATH\n"
        'exec sh -c "$2";;\n'
        "esac; shift; done",
    )
    return probe.Host(str(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("libucx") is None, reason="no UCX in this environment")
@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        (["UCX_TLS=tcp", "UCX_NET_DEVICES=lo"], ""),
        (["UCX_TLS=tcp", "UCX_NET_DEVICE=lo"], "unused environment variable: UCX_NET_DEVICE"),
        (["UCX_TLS=tcp", "UCX_NET_DEVICES=mlx5_9:1"], "network device 'mlx5_9:1' is not available"),
        (["UCX_TLS=rc"], "'rc' is not available"),
    ],
    ids=["right", "misspelt", "device", "transport"],
)
def test_a_real_ucx_complains_about_a_wrong_environment(tmp_path: Path, environment: list[str], complaint: str) -> None:
    words = ["--image", "runtime:1"] + [word for pair in environment for word in ("--image-env", pair)]
    found = probe.image_facts(image_of_this_environment(tmp_path), probe.parser().parse_args(words))
    assert "tcp" in found["ucx"]["transports"]
    assert found["versions"]["ai-dynamo"]
    if complaint:
        assert complaint in found["ucx"]["complaints"][0]
    else:
        assert (found["ucx"]["rc"], found["ucx"]["complaints"]) == (0, [])
