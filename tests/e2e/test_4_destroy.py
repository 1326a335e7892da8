"""Destroy leaves nothing: no container, volume, network, file, process or open port of the deployment."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def left(deployed: Any) -> dict[str, Any]:
    """What there was before, and is there after."""
    stack = deployed
    deployment, topology = stack.deployment, stack.topology
    processes = {entry["State"]["Pid"] for entry in stack.inspect().values()}
    volumes = {mount["Name"] for entry in stack.inspect().values() for mount in entry["Mounts"] if "Name" in mount}
    ports = [int(url.rpartition(":")[2]) for url in urls(topology)]
    run = stack.play("playbooks/lifecycle/destroy.yml")
    assert run.status == 0
    stack.report["destroy_s"] = round(run.seconds)
    return {
        "deployment": deployment,
        "processes": processes,
        "volumes": volumes,
        "ports": ports,
        "seconds": run.seconds,
    }


def urls(topology: dict[str, Any]) -> list[str]:
    entries = [
        *((entry, "client_url") for entry in topology["etcd"]),
        *((entry, "peer_url") for entry in topology["etcd"]),
        *((entry, "url") for entry in topology["nats"]),
        *((entry, "monitor_url") for entry in topology["nats"]),
        *((entry, "url") for entry in topology["frontends"]),
        *((entry, "status_url") for entry in topology["workers"]),
    ]
    return [entry[key] for entry, key in entries]


def test_no_container_and_no_volume(left: dict[str, Any], engine_command: Callable[..., str]) -> None:
    try:
        containers = engine_command("ps", "--all", "--format", "{{.Names}}").split()
        volumes = set(engine_command("volume", "ls", "--quiet").split())
        networks = engine_command("network", "ls", "--format", "{{.Name}}").split()
    except (subprocess.CalledProcessError, FileNotFoundError):
        return  # the engine was pdstack's own and this was its last deployment: it is gone with all it held
    assert not [name for name in containers if name.startswith("pdstack-e2e-")]
    assert not left["volumes"] & volumes
    assert not [name for name in networks if "pdstack" in name]


def test_no_process(left: dict[str, Any]) -> None:
    assert left["processes"]
    for pid in left["processes"]:
        command = Path(f"/proc/{pid}/cmdline")
        assert not command.exists() or b"pdstack" not in command.read_bytes(), f"process {pid} is still there"


def test_no_file(left: dict[str, Any], stack: Any) -> None:
    directories = left["deployment"]["directories"]
    for path in (directories["config"], directories["data"], str(stack.state_dir)):
        assert not Path(path).exists(), path


def test_no_port(left: dict[str, Any]) -> None:
    assert len(left["ports"]) == len(set(left["ports"])) >= 8
    for port in left["ports"]:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, f"somebody still listens on {port}"


def test_destroying_nothing_is_no_error(stack: Any) -> None:
    run = stack.play("playbooks/lifecycle/destroy.yml")
    assert run.status == 0
    assert run.changed == 0
