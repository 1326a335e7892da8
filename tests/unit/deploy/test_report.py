from __future__ import annotations

import json
from typing import Any

from pdstack.deploy import report, topology


def container(name: str, status: str = "running", health: str | None = "healthy") -> dict[str, Any]:
    state: dict[str, Any] = {"Status": status, "ExitCode": 137}
    if health:
        state["Health"] = {"Status": health}
    return {"Name": f"/{name}", "State": state, "RestartCount": 2, "Config": {"Labels": {"pdstack.version": "1.2"}}}


def lines(inventory: Any, *containers: dict[str, Any], text: str | None = "") -> dict[str, list[str]]:
    built = topology.build(inventory.groups(), inventory.hosts(), inventory.settings(pdstack_name="t"))
    table = report.status(built, {"a": json.dumps(containers) if containers else text})
    return {line.split("  ")[0]: line.split() for line in table[1:]}


def test_health_version_and_restarts(inventory: Any) -> None:
    rows = lines(inventory, container("pdstack-t-etcd"), container("pdstack-t-nats", "exited"))
    assert rows["etcd"] == ["etcd", "a", "1.2", "healthy", "2", "http://127.0.0.1:2379"]
    assert "exited (137)" in " ".join(rows["nats"])
    assert "not deployed" in " ".join(rows["frontend"])


def test_a_host_that_was_not_reached_is_said(inventory: Any) -> None:
    assert "host not reached" in " ".join(lines(inventory, text=None)["etcd"])


def test_a_container_without_health_check_is_running(inventory: Any) -> None:
    assert "running" in lines(inventory, container("pdstack-t-etcd", health=None))["etcd"]
