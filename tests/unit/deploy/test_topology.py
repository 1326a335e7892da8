from __future__ import annotations

from typing import Any

import pytest

from pdstack.deploy import topology


def test_one_local_host(inventory: Any) -> None:
    built = topology.build(inventory.groups(), inventory.hosts(), inventory.settings(pdstack_name="t"))
    assert built["etcd_endpoints"] == ["http://127.0.0.1:2379"]
    assert built["etcd_initial_cluster"] == "a=http://127.0.0.1:2380"
    assert built["nats_servers"] == ["nats://127.0.0.1:4222"]
    assert [front["url"] for front in built["frontends"]] == ["http://127.0.0.1:8000"]
    assert [(w["name"], w["index"], w["status_port"], w["transfer_port"]) for w in built["workers"]] == [
        ("decode-0", 0, 9150, 9250),
        ("prefill-0", 0, 9100, 9200),
    ]
    assert built["workers"][0]["container"] == "pdstack-t-decode-0"


def test_another_worker_moves_no_port_of_those_there_are(inventory: Any) -> None:
    before = topology.build(inventory.groups(), inventory.hosts(), inventory.settings())["workers"]
    more = inventory.hosts(prefill_workers=[{}, {"name": "a"}], decode_workers=[{}, {}])
    after = topology.build(inventory.groups(), more, inventory.settings())["workers"]
    assert len(after) == 4
    assert all(worker in after for worker in before)


def test_offset_moves_every_port(inventory: Any) -> None:
    plain = topology.port_uses(topology.build(inventory.groups(), inventory.hosts(), inventory.settings()))
    moved = topology.port_uses(
        topology.build(inventory.groups(), inventory.hosts(), inventory.settings(pdstack_port_offset="10000"))
    )
    assert [use["port"] + 10000 for use in plain] == [use["port"] for use in moved]


def test_cluster_names_workers_over_hosts_and_keeps_given_names(inventory: Any) -> None:
    hosts = inventory.hosts("p1", "p2", "d1", "c1", "c2", "c3", ansible_connection="ssh")
    hosts["p1"]["ansible_host"] = "10.0.0.1"
    hosts["p2"]["pdstack_address"] = "10.1.0.2"
    hosts["p2"]["prefill_workers"] = [{"name": "big", "engine": {"kv_blocks": 9}, "env": {"A": 1}}, {}]
    groups = inventory.groups(
        etcd=["c1", "c2", "c3"], nats=["c1"], frontend=["c1"], prefill=["p1", "p2"], decode=["d1"]
    )
    built = topology.build(groups, hosts, inventory.settings())
    assert [(worker["name"], worker["address"]) for worker in built["workers"]] == [
        ("big", "10.1.0.2"),
        ("decode-0", "d1"),
        ("prefill-0", "10.0.0.1"),
        ("prefill-2", "10.1.0.2"),
    ]
    assert built["workers"][0]["engine"] == {"kv_blocks": 9}
    assert built["workers"][0]["env"] == {"A": "1"}
    assert built["etcd_endpoints"] == ["http://c1:2379", "http://c2:2379", "http://c3:2379"]


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({"pdstack_address": "10.0.0.9", "ansible_connection": "local"}, "10.0.0.9"),
        ({"ansible_connection": "local"}, "127.0.0.1"),
        ({"ansible_host": "10.0.0.8"}, "10.0.0.8"),
        ({}, "node"),
    ],
)
def test_host_address(variables: dict[str, Any], address: str) -> None:
    assert topology.host_address("node", variables) == address


def test_ipv6_is_bracketed_in_urls(inventory: Any) -> None:
    built = topology.build(inventory.groups(), inventory.hosts(pdstack_address="fd00::1"), inventory.settings())
    assert built["nats_servers"] == ["nats://[fd00::1]:4222"]


def test_decode_workers_need_no_transfer_port(inventory: Any) -> None:
    uses = topology.port_uses(topology.build(inventory.groups(), inventory.hosts(), inventory.settings()))
    assert not [use for use in uses if use["container"].endswith("decode-0") and "transfer" in use["service"]]


def test_a_prefill_worker_has_a_stream_port_and_every_worker_ports_for_its_end(inventory: Any) -> None:
    hosts = inventory.hosts(prefill_workers=[{}, {}], decode_workers=[{}])
    built = topology.build(inventory.groups(), hosts, inventory.settings(pdstack_port_offset=1000))
    assert [(w["name"], w["stream_port"], w["kv_path_ports"]) for w in built["workers"]] == [
        ("decode-0", 0, [10650]),
        ("prefill-0", 10300, [10500, 10501, 10502]),
        ("prefill-1", 10301, [10503, 10504, 10505]),
    ]
    used = {use["port"]: use["service"] for use in topology.port_uses(built)}
    assert used[10301] == "worker prefill-1 (stream)" and used[10505] == "worker prefill-1 (step kv_path)"
    gpus = inventory.hosts(prefill_workers=[{"gpus": [0]}], decode_workers=[{"gpus": [1]}])
    others = topology.build(inventory.groups(), gpus, inventory.settings(engine="trtllm"))
    assert all(not worker["stream_port"] and not worker["kv_path_ports"] for worker in others["workers"])


def test_every_rank_of_a_trtllm_worker_has_a_port_of_its_own(inventory: Any) -> None:
    hosts = inventory.hosts(prefill_workers=[{"gpus": [0, 1]}, {"gpus": [2, 3]}], decode_workers=[{"gpus": [4]}])
    built = topology.build(inventory.groups(), hosts, inventory.settings(engine="trtllm"))
    assert [(w["name"], w["transfer_port"], w["gpus"]) for w in built["workers"]] == [
        ("decode-0", 20800, [4]),
        ("prefill-0", 20000, [0, 1]),
        ("prefill-1", 20016, [2, 3]),
    ]
    ranks = [use["port"] for use in topology.port_uses(built) if "rank" in use["service"]]
    assert ranks == [20800, 20000, 20001, 20016, 20017]


def test_nats_servers_know_each_other(inventory: Any) -> None:
    names = ["c1", "c2", "c3"]
    hosts = inventory.hosts("a", *names, ansible_connection="ssh")
    built = topology.build(inventory.groups(nats=names), hosts, inventory.settings(pdstack_name="t"))
    assert built["nats"][1]["routes"] == ["nats://c1:6222", "nats://c3:6222"]
    assert [server["server_name"] for server in built["nats"]] == ["pdstack-t-c1", "pdstack-t-c2", "pdstack-t-c3"]
    assert [use["port"] for use in topology.port_uses(built) if "cluster" in use["service"]] == [6222] * 3
    alone = topology.build(inventory.groups(), hosts, inventory.settings())
    assert not [use for use in topology.port_uses(alone) if "cluster" in use["service"]]


def test_clients_begin_with_their_own_server_and_the_others_are_spread(inventory: Any) -> None:
    servers = ["c1", "c2", "c3"]
    decodes = [f"d{number}" for number in range(30)]
    hosts = inventory.hosts("a", *servers, *decodes, ansible_connection="ssh")
    groups = inventory.groups(nats=servers, frontend=["c2"], prefill=["a"], decode=decodes)
    built = topology.build(groups, hosts, inventory.settings())
    assert built["frontends"][0]["nats_server"] == "nats://c2:4222"
    used = {worker["host"]: worker["nats_server"] for worker in built["workers"]}
    assert set(used.values()) == set(built["nats_servers"])
    fewer = topology.build(groups | {"decode": decodes[7:]}, hosts, inventory.settings())
    assert all(used[worker["host"]] == worker["nats_server"] for worker in fewer["workers"])
