"""What the scenarios' tests share: how the host is reached, and what its containers look like."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

UID = 64000
# tests/molecule/vars.yml
OFFSET = 5000
NAME = "molecule"


@pytest.fixture(scope="session")
def address() -> str:
    """The host's address, the same from here and from within."""
    return (Path(os.environ["PDSTACK_MOLECULE_STATE"]) / "address").read_text().strip()


@pytest.fixture(scope="session")
def at(address: str) -> Callable[..., str]:
    """Make a URL of a service from its port without the offset."""

    def url(port: int, path: str = "", scheme: str = "http") -> str:
        return f"{scheme}://{address}:{port + OFFSET}{path}"

    return url


@pytest.fixture
def container(host: Host) -> Callable[[str], dict[str, Any]]:
    """Inspect the container of a service; it must exist and run."""

    def inspect(service: str) -> dict[str, Any]:
        found = json.loads(host.check_output(f"docker container inspect pdstack-{NAME}-{service}"))[0]
        assert found["State"]["Running"], host.run(f"docker logs --tail 50 pdstack-{NAME}-{service}").stdout
        return found

    return inspect


@pytest.fixture
def is_confined(container: Callable[[str], dict[str, Any]]) -> Callable[[str], bool]:
    """Check what every service has in common."""

    def check(service: str) -> bool:
        found = container(service)
        config, limits = found["Config"], found["HostConfig"]
        assert config["User"] == f"{UID}:{UID}"
        assert config["Hostname"] == f"pdstack-{NAME}-{service}"
        assert "RUST_BACKTRACE=0" in config["Env"]
        assert limits["ReadonlyRootfs"]
        assert limits["CapDrop"] == ["ALL"]
        assert limits["NetworkMode"] == "host"
        assert limits["RestartPolicy"]["Name"] == "always"
        assert limits["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "3"}
        assert "Health" in found["State"]
        return True

    return check


@pytest.fixture
def check_health(host: Host, container: Callable[[str], dict[str, Any]]) -> Callable[[str], bool]:
    """Ask a container's own health check now, without waiting for the engine to."""

    def ask(service: str) -> bool:
        command = container(service)["Config"]["Healthcheck"]["Test"]
        assert command[0] == "CMD"
        quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in command[1:])
        done = host.run(f"docker exec pdstack-{NAME}-{service} {quoted}")
        assert done.rc == 0, done.stderr or done.stdout
        return True

    return ask
