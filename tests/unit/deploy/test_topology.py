from __future__ import annotations

from typing import Any

import pytest

from pdstack.deploy import topology


def test_one_local_host(inventory: Any) -> None:
    built = topology.build(inventory.groups(), inventory.hosts(), inventory.settings(pdstack_name="t"))
    assert built["etcd_endpoints"] == ["http://127.0.0.1:2379"]
    assert built["etcd_initial_cluster"] == "a=http://127.0.0.1:2380"
    assert built["nats_server"] == "nats://127.0.0.1:4222"
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
    assert built["nats_server"] == "nats://[fd00::1]:4222"


def test_decode_workers_need_no_transfer_port(inventory: Any) -> None:
    uses = topology.port_uses(topology.build(inventory.groups(), inventory.hosts(), inventory.settings()))
    assert not [use for use in uses if use["container"].endswith("decode-0") and "transfer" in use["service"]]
