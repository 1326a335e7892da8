from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdstack.deploy import topology
from pdstack.doctor import plan, probe

COMMON = Path(__file__).resolve().parents[3] / "inventories/common/group_vars/all"
GROUPS = {"etcd": ["c1"], "nats": ["c1"], "frontend": ["f1"], "prefill": ["g1"], "decode": ["g2"]}


def common() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(COMMON.glob("*.yml")):
        found |= yaml.safe_load(path.read_text())
    return found


def deployment(**changed: Any) -> tuple[Any, dict[str, Any], dict[str, dict[str, Any]]]:
    """Return topology, settings and host variables of two GPU hosts; `changed` are variables of g1 and g2."""
    known = common()
    settings = {key: copy.deepcopy(known[key]) for key in known["pdstack_settings"]} | {"engine": "trtllm"}
    gpu = {"gpu_count": 4, "kv_fabric": "tcp", "pdstack_model_dir": "/models/m", **changed}
    hosts: dict[str, dict[str, Any]] = {
        "c1": {"pdstack_address": "10.0.0.1"},
        "f1": {"pdstack_address": "10.0.0.2"},
        "g1": {"pdstack_address": "10.0.0.11", "prefill_workers": [{"gpus": [0, 1]}, {"gpus": [2, 3]}], **gpu},
        "g2": {"pdstack_address": "10.0.0.12", "decode_workers": [{"gpus": [0]}], **gpu},
    }
    return topology.build(GROUPS, hosts, settings), settings, hosts


def test_what_a_gpu_host_must_have() -> None:
    made, settings, hosts = deployment()
    wanted = plan.build(made, "g1", settings, hosts)
    assert (wanted["gpu_host"], wanted["gpu_count"], wanted["gpus_used"]) == (True, 4, [0, 1, 2, 3])
    assert wanted["roles"] == ["prefill"]
    assert wanted["driver_minimum"] == settings["versions"]["gpu"]["driver_minimum"]
    assert wanted["image_versions"] == {"ai-dynamo": "0.7.0.post1", "tensorrt-llm": "1.2.0rc3"}
    assert wanted["reach"] == ["10.0.0.1:2379", "10.0.0.1:4222"]
    assert set(wanted["disk_mib"]) == {"/var/lib/docker", "/models/m"}
    assert {use["service"].split()[0] for use in wanted["ports"]} == {"worker"}
    assert wanted["worker_containers"] == ["pdstack-local-prefill-0", "pdstack-local-prefill-1"]
    assert wanted["fabric"]["transports"] == ["tcp"]


def test_other_hosts_are_not_gpu_hosts() -> None:
    made, settings, hosts = deployment()
    etcd = plan.build(made, "c1", settings, hosts)
    assert (etcd["gpu_host"], etcd["roles"], etcd["reach"]) == (False, ["etcd", "nats"], [])
    assert etcd["etcd_member"] == "http://10.0.0.1:2379"
    assert plan.build(made, "f1", settings, hosts)["reach"] == ["10.0.0.1:2379", "10.0.0.1:4222"]


def test_the_reference_engine_has_no_gpu_hosts() -> None:
    made, settings, hosts = deployment()
    assert not plan.build(made, "g1", settings | {"engine": "reference"}, hosts)["gpu_host"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tcp", {"rdma": False, "ipc": False, "nvlink": False, "ipc_mode": "private"}),
        ("nvlink_single", {"rdma": False, "ipc": True, "nvlink": True, "pid_mode": "host"}),
        ("pcie_single", {"rdma": False, "ipc": True, "nvlink": False}),
        ("same_host", {"rdma": False, "ipc": True, "nvlink": False}),
        ("ib", {"rdma": True, "ipc": False, "ipc_mode": "host"}),
        ("roce", {"rdma": True, "nvlink": False}),
        ("nvlink_multi", {"rdma": True, "ipc": True, "nvlink": True}),
        ("auto", {"rdma": True}),
    ],
)
def test_what_the_fabrics_of_the_project_ask_for(name: str, expected: dict[str, Any]) -> None:
    made, settings, hosts = deployment(kv_fabric=name, kv_net_devices=["mlx5_0:1"], kv_interface="eth0")
    wanted = plan.build(made, "g1", settings, hosts)
    assert wanted["fabric"] | expected == wanted["fabric"]
    assert wanted["net_devices"] == ["mlx5_0:1"]
    assert wanted["env_interfaces"] == ["eth0"]
    assert wanted["gid_index"] == ("3" if name == "roce" else "")


def test_the_mtu_of_peers_comes_from_their_facts() -> None:
    made, settings, hosts = deployment()
    interfaces = [
        {"name": "ens1", "mtu": 1500, "addresses": ["10.0.0.12"]},
        {"name": "lo", "mtu": 65536, "addresses": []},
    ]
    hosts["g2"]["pdstack_probe"] = {"net": {"interfaces": interfaces}}
    assert plan.build(made, "g1", settings, hosts)["peer_mtu"] == {"g2": 1500}
    assert plan.build(made, "g2", settings, hosts)["peer_mtu"] == {}
    hosts["g2"]["kv_interface"] = "lo"
    assert plan.build(made, "g1", settings, hosts)["peer_mtu"] == {"g2": 65536}


def test_the_probe_understands_what_it_is_asked() -> None:
    made, settings, hosts = deployment(kv_fabric="ib", kv_net_devices=["mlx5_0:1"])
    words = plan.probe_options(plan.build(made, "g1", settings, hosts), "/r", image="runtime:1", perf=True)
    asked = probe.parser().parse_args(words)
    assert (asked.root, asked.image, asked.perf) == ("/r", "runtime:1", True)
    assert asked.path == ["/var/lib/docker", "/models/m"]
    assert asked.reach == ["10.0.0.1:2379", "10.0.0.1:4222"]
    assert asked.etcd == ["http://10.0.0.1:2379"]
    assert {"--device=/dev/infiniband", "--pid=host", "--ipc=host", "--gpus=all"} <= set(asked.run_option)
    assert "UCX_NET_DEVICES=mlx5_0:1" in asked.image_env
    hosts["g1"]["doctor_network"] = False
    asked = probe.parser().parse_args(plan.probe_options(plan.build(made, "g1", settings, hosts)))
    assert asked.reach == asked.etcd == asked.nats == []


def test_only_gpu_hosts_start_containers() -> None:
    made, settings, hosts = deployment()
    words = plan.probe_options(plan.build(made, "c1", settings, hosts), image="runtime:1")
    assert "--image" not in words


def test_switches_of_a_host() -> None:
    made, settings, hosts = deployment(gpu_driver__manage=False, rdma__manage="no", gdrcopy__manage="true")
    wanted = plan.build(made, "g1", settings, hosts)
    assert (wanted["unmanaged"], wanted["gdrcopy"]) == (["gpu_driver", "rdma"], True)
    made, settings, hosts = deployment()
    wanted = plan.build(made, "g1", settings, hosts)
    assert (wanted["unmanaged"], wanted["gdrcopy"], wanted["network"]) == ([], False, True)


def test_a_site_says_how_much_disk_it_needs() -> None:
    made, settings, hosts = deployment(doctor_disk_mib={"/data": 10})
    assert plan.build(made, "g1", settings, hosts)["disk_mib"] == {"/data": 10}
