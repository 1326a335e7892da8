from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def state(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.rootpath / ".pdstack/molecule"


@pytest.fixture(scope="module")
def results(state: Path) -> dict[str, Any]:
    return json.loads((state / "verify.json").read_text())


def test_the_deployment_is_described(state: Path) -> None:
    deployment = json.loads((state / "deployment.json").read_text())
    assert deployment["name"] == "molecule"
    assert len(deployment["topology"]["workers"]) == 2
    assert deployment["images"].keys() == {"etcd", "nats", "worker"}


def test_it_was_proved(results: dict[str, Any]) -> None:
    assert results["passed"]
    assert {service["health"] for service in results["services"]} == {"healthy"}
    assert len(results["services"]) == 5
    assert results["equality"]["tokens"] > 0
    assert results["kv"]["backend"] == "ucx"
    assert results["kv"]["transports"] in (["shared"], ["cma"], ["cma", "shared"])
    assert results["kv"]["gb_per_s"] > 0
    assert results["kv"]["memcpy_gb_per_s"] > 0


def test_no_secret_is_in_the_description(state: Path) -> None:
    key = (state / "cluster.key").read_text().strip()
    assert key not in (state / "deployment.json").read_text()
