"""etcd and NATS answer as Dynamo needs them."""

from __future__ import annotations

from typing import Any

from pdstack.deploy import ask, prove


def test_every_etcd_endpoint_is_healthy(topology: dict[str, Any]) -> None:
    assert topology["etcd"]
    for member in topology["etcd"]:
        assert ask.get_json(f"{member['client_url']}/health")["health"] == "true", member["client_url"]


def test_etcd_takes_a_write_and_gives_it_back(topology: dict[str, Any]) -> None:
    assert "was read through" in prove.prove_etcd(topology["etcd_endpoints"])


def test_jetstream_is_on(topology: dict[str, Any]) -> None:
    assert topology["nats"]
    for server in topology["nats"]:
        status = ask.get_json(f"{server['monitor_url']}/jsz")
        assert not status.get("disabled", False), f"{server['monitor_url']}: JetStream is disabled"
        assert status["config"]["store_dir"], status


def test_jetstream_stores_a_message(topology: dict[str, Any]) -> None:
    for server in topology["nats"]:
        assert "stored a message" in prove.prove_jetstream(server["url"])
