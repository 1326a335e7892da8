"""The deployment under test: read from the file that the Ansible role `verify` writes (PDSTACK_DEPLOYMENT).

Hosts are reached by testinfra's own connections. What the tests measure is collected in `results` and written to
PDSTACK_VERIFY_RESULT (verify.json beside the deployment's file), where the table at the end of a run comes from.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

import testinfra
from pdstack.deploy import proof

USAGE = "set PDSTACK_DEPLOYMENT to the deployment.json of a deployment, or run `nox -s verify`"
DEPTHS = ("quick", "full")


def deployment_file() -> Path:
    path = Path(os.environ.get("PDSTACK_DEPLOYMENT", ""))
    if not path.is_file():
        raise pytest.UsageError(f"found no deployment file at {str(path)!r}; {USAGE}")
    return path


def read_deployment() -> dict[str, Any]:
    return json.loads(deployment_file().read_text())


def service_list(deployment: dict[str, Any]) -> list[dict[str, Any]]:
    """All containers of the deployment: service, host, container, image (key of images), endpoint."""
    topology = deployment["topology"]
    engine = "runtime" if deployment["engine"] == "trtllm" else "worker"
    etcd, nats = ("runtime", "runtime") if deployment.get("coordination") == "runtime" else ("etcd", "nats")
    kinds = [("etcd", etcd, "client_url"), ("nats", nats, "url"), ("frontends", engine, "url")]
    services = [
        {
            "service": entry["container"].rpartition("-")[2],
            "kind": kind,
            "image": image,
            "endpoint": entry[endpoint],
            **entry,
        }
        for kind, image, endpoint in kinds
        for entry in topology[kind]
    ]
    workers = [
        {"service": entry["name"], "kind": "workers", "image": engine, "endpoint": entry["status_url"], **entry}
        for entry in topology["workers"]
    ]  # fmt: skip
    return services + workers


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "engine(name): for deployments with this engine only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is for another engine: it is no part of this deployment's proof."""
    engine = read_deployment()["engine"]
    others = [item for item in items if (mark := item.get_closest_marker("engine")) and mark.args[0] != engine]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "service" in metafunc.fixturenames:
        services = service_list(read_deployment())
        metafunc.parametrize("service", services, ids=[f"{s['host']}-{s['service']}" for s in services])


@pytest.fixture(scope="session")
def deployment() -> dict[str, Any]:
    return read_deployment()


@pytest.fixture(scope="session")
def topology(deployment: dict[str, Any]) -> dict[str, Any]:
    return deployment["topology"]


@pytest.fixture(scope="session")
def depth() -> str:
    found = os.environ.get("PDSTACK_VERIFY_DEPTH", "quick")
    if found not in DEPTHS:
        raise pytest.UsageError(f"PDSTACK_VERIFY_DEPTH: found {found!r}, wanted one of {', '.join(DEPTHS)}")
    return found


@pytest.fixture(scope="session")
def hosts(deployment: dict[str, Any]) -> dict[str, Host]:
    """testinfra's hosts by inventory name."""
    return {
        name: testinfra.get_host(proof.testinfra_spec(name, connection))
        for name, connection in deployment["hosts"].items()
    }


@pytest.fixture(scope="session")
def state_dir() -> Path:
    return deployment_file().parent


@pytest.fixture(scope="session")
def results(depth: str, state_dir: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {"depth": depth, "started": time.time(), "services": []}
    yield found
    found["seconds"] = round(time.time() - found.pop("started"), 1)
    found["passed"] = request.session.testsfailed == 0
    target = Path(os.environ.get("PDSTACK_VERIFY_RESULT") or state_dir / "verify.json")
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=2) + "\n")
    partial.replace(target)


@pytest.fixture(scope="session")
def inspected(hosts: dict[str, Host], deployment: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`docker inspect` of every container of the deployment, by host and container name; one call a host."""
    found = {}
    for name, host in hosts.items():
        containers = [s["container"] for s in service_list(deployment) if s["host"] == name]
        if containers:
            output = host.run("docker container inspect " + " ".join(containers)).stdout
            found[name] = {entry["Name"].lstrip("/"): entry for entry in json.loads(output or "[]")}
    return found
