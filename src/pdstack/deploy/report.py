"""The state of a deployment as lines to read, from what the container engines of its hosts say."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

from pdstack.deploy.summary import columns
from pdstack.deploy.topology import Topology

HEADINGS = ("service", "host", "version", "health", "restarts", "endpoint")


class Entry(TypedDict):
    """One service of the topology, whatever its kind."""

    service: str
    host: str
    container: str
    endpoint: str


def entries(deployment: Topology) -> Iterator[Entry]:
    """Yield the services in the order of dependency: etcd, NATS, frontends, workers."""
    for member in deployment["etcd"]:
        yield {
            "service": "etcd",
            "host": member["host"],
            "container": member["container"],
            "endpoint": member["client_url"],
        }
    for server in deployment["nats"]:
        yield {"service": "nats", "host": server["host"], "container": server["container"], "endpoint": server["url"]}
    for front in deployment["frontends"]:
        yield {"service": "frontend", "host": front["host"], "container": front["container"], "endpoint": front["url"]}
    for worker in deployment["workers"]:
        yield {
            "service": f"{worker['role']} {worker['name']}", "host": worker["host"], "container": worker["container"],
            "endpoint": worker["status_url"],
        }  # fmt: skip


def health(inspected: Mapping[str, Any]) -> str:
    """Return the health that an engine's description of a container tells: healthy, starting, exited (0), ..."""
    state = inspected["State"]
    if state["Status"] != "running":
        return f"{state['Status']} ({state.get('ExitCode', '?')})"
    return str((state.get("Health") or {}).get("Status", "running"))


def status(deployment: Topology, inspected: Mapping[str, str | None]) -> list[str]:
    """Return the table of services; `inspected` maps a host to the JSON of `docker container inspect`.

    None for a host means that it could not be asked.
    """
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for host, text in inspected.items():
        for container in json.loads(text or "[]"):
            found[host, container["Name"].lstrip("/")] = container
    rows = [HEADINGS]
    for entry in entries(deployment):
        container = found.get((entry["host"], entry["container"]))
        if container is None:
            missing = "not deployed" if inspected.get(entry["host"]) is not None else "host not reached"
            rows.append((entry["service"], entry["host"], "-", missing, "-", entry["endpoint"]))
        else:
            version = (container["Config"]["Labels"] or {}).get("pdstack.version", "-")
            restarts = str(container["RestartCount"])
            rows.append((entry["service"], entry["host"], version, health(container), restarts, entry["endpoint"]))
    return columns(rows)
