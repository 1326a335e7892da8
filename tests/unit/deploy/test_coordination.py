from __future__ import annotations

import json
from typing import Any

import pytest

from pdstack.deploy import coordination, service, topology


@pytest.fixture
def cluster(inventory: Any) -> topology.Topology:
    names = ["c1", "c2", "c3"]
    hosts = inventory.hosts("a", *names)
    return topology.build(inventory.groups(etcd=names, nats=names), hosts, inventory.settings(pdstack_name="t"))


def config(server: topology.Nats, built: topology.Topology) -> str:
    return coordination.nats_config(server, built, store_dir="/s", store_mib=10, payload_mib=1)


def test_a_server_of_a_cluster_names_itself_and_the_others(cluster: topology.Topology) -> None:
    text = config(cluster["nats"][1], cluster)
    assert 'server_name: "pdstack-t-c2"' in text
    assert 'name: "pdstack-t-nats"' in text
    assert 'listen: "c2:6222"' in text
    assert f"routes: {json.dumps(['nats://c1:6222', 'nats://c3:6222'])}" in text


def test_a_server_that_stands_alone_has_no_cluster(inventory: Any) -> None:
    built = topology.build(inventory.groups(), inventory.hosts(), inventory.settings())
    assert "cluster" not in config(built["nats"][0], built)


def test_members_of_etcd_know_each_other(cluster: topology.Topology) -> None:
    spec = coordination.etcd(cluster["etcd"][2], cluster, image="i:1", version="3", data_dir="/d", quota_mib=64)
    command = spec["command"]
    assert command[command.index("--name") + 1] == "c3"
    assert command[command.index("--initial-cluster") + 1] == "c1=http://c1:2380,c2=http://c2:2380,c3=http://c3:2380"


@pytest.mark.parametrize(
    ("setting", "engine", "releases", "wanted"),
    [
        ("auto", "reference", ["noble"], "own"),
        ("auto", "trtllm", ["bookworm", "bookworm"], "own"),
        # All members are of one version: one host without pins decides for all.
        ("auto", "trtllm", ["bookworm", "noble"], "runtime"),
        ("own", "trtllm", ["noble"], "own"),
        ("runtime", "trtllm", ["bookworm"], "runtime"),
    ],
)
def test_which_image_etcd_and_nats_run_from(setting: str, engine: str, releases: list[str], wanted: str) -> None:
    assert coordination.image_choice(setting, engine=engine, releases=releases, pinned="bookworm") == wanted


def test_the_runtime_image_is_told_what_to_start(cluster: topology.Topology) -> None:
    server = cluster["nats"][0]
    own = coordination.nats(server, image="i:1", version="2", config="")
    runtime = coordination.nats(server, image="i:1", version="2", config="", entrypoint=["nats-server"])
    assert "entrypoint" not in own
    assert runtime["entrypoint"] == ["nats-server"]
    assert service.errors(runtime, "t") == []
