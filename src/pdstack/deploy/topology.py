"""The deployment derived from the inventory: which service runs where, on which ports, under which name.

Everything that one service must know of another comes from here, so that it is never typed twice. `build` is pure:
the same groups and variables give the same topology, in the order of the inventory.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

ROLES = ("prefill", "decode")
LOOPBACK = "127.0.0.1"
# A host's prefill workers take the ports from the base on, its decode workers those from here on: a worker more of one
# role moves no port of the other, nor of another host.
DECODE_PORTS = 50
# A rank of a TensorRT-LLM worker listens on the worker's port plus its rank; no host has more GPUs than this.
RANK_PORTS = 16
# An end of the step kv_path listens for the one who asks, and at a prefill worker's place for a stream and its limit.
KV_PATH_PORTS = 3
# Where a service finds its own configuration, in its container.
CONFIG_MOUNT = "/etc/pdstack"


class Etcd(TypedDict):
    """One etcd member."""

    host: str
    address: str
    member: str
    client_port: int
    peer_port: int
    client_url: str
    peer_url: str
    container: str


class Nats(TypedDict):
    """One NATS server; `routes` are the other servers of its cluster (none: it stands alone)."""

    host: str
    address: str
    server_name: str
    client_port: int
    cluster_port: int
    monitor_port: int
    url: str
    route_url: str
    routes: list[str]
    monitor_url: str
    container: str


class Frontend(TypedDict):
    """One frontend (OpenAI-compatible HTTP)."""

    host: str
    address: str
    port: int
    url: str
    container: str
    nats_server: str


class Worker(TypedDict):
    """One worker; `index` counts the workers of its role on its host and decides its ports.

    With engine reference a prefill worker also listens on `stream_port` (else 0), and `kv_path_ports` are those of the
    end that stands in for the worker in the step kv_path: control, and for prefill stream and limit.

    With engine trtllm `gpus` are the GPUs of the host that it has, one rank each, and a rank's port for KV is
    `transfer_port` plus the rank; `args` are its options of `python3 -m dynamo.trtllm`.
    """

    name: str
    role: str
    host: str
    address: str
    index: int
    status_port: int
    transfer_port: int
    stream_port: int
    kv_path_ports: list[int]
    status_url: str
    container: str
    nats_server: str
    engine: dict[str, Any]
    env: dict[str, str]
    gpus: list[int]
    args: dict[str, Any]


class Topology(TypedDict):
    """The whole deployment."""

    name: str
    engine: str
    etcd: list[Etcd]
    nats: list[Nats]
    frontends: list[Frontend]
    workers: list[Worker]
    etcd_endpoints: list[str]
    etcd_initial_cluster: str
    nats_servers: list[str]


class PortUse(TypedDict):
    """One port that a service of the deployment listens on."""

    host: str
    address: str
    port: int
    service: str
    container: str


def host_address(host: str, variables: Mapping[str, Any]) -> str:
    """Return where others reach `host`: `pdstack_address`, else loopback for a local connection, else its name."""
    if address := variables.get("pdstack_address"):
        return str(address)
    if variables.get("ansible_connection") == "local":
        return LOOPBACK
    return str(variables.get("ansible_host") or host)


def bracketed(address: str) -> str:
    """Return `address` as it stands in a URL (IPv6 in brackets)."""
    return f"[{address}]" if ":" in address else address


def worker_items(variables: Mapping[str, Any], role: str) -> list[Mapping[str, Any]]:
    """Return the worker entries that a host lists for `role`; what is no mapping is left out (see validate)."""
    items = variables.get(f"{role}_workers")
    if not isinstance(items, Sequence) or isinstance(items, str):
        return []
    return [item for item in items if isinstance(item, Mapping)]


def nats_server(host: str, servers: Sequence[Nats]) -> str:
    """Return the NATS server that the clients on `host` begin with: the host's own, else one that its name picks.

    Dynamo 0.7 takes one URL (a list is refused). Of the others of the cluster it learns on connecting, and goes on
    with one of them, without losing a request, when its own is lost (tests/integration/test_clusters.py); but a
    client that starts needs the server it begins with, so the hosts are spread over all.
    """
    if not servers:
        return ""
    own = [server["url"] for server in servers if server["host"] == host]
    # By name, so that a host more changes nothing for the others.
    return own[0] if own else servers[zlib.crc32(host.encode()) % len(servers)]["url"]


def container_name(deployment: str, service: str) -> str:
    """Return the container of `service` in `deployment`."""
    return f"pdstack-{deployment}-{service}"


def build(
    groups: Mapping[str, Sequence[str]], hosts: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> Topology:
    """Return the topology of an inventory that passed `validate.problems`.

    `groups` maps a group to its hosts, `hosts` a host to its variables, `settings` is `pdstack_settings`.
    Workers are numbered per role in inventory order (`prefill-0`, `prefill-1`, ...), unless an entry names itself.
    """
    name = str(settings["pdstack_name"])
    offset = int(settings["pdstack_port_offset"])
    port = {key: int(value) + offset for key, value in settings["pdstack_ports"].items()}
    address = {host: host_address(host, hosts[host]) for group in groups.values() for host in group if host in hosts}

    etcd: list[Etcd] = [
        {
            "host": host,
            "address": address[host],
            "member": host,
            "client_port": port["etcd_client"],
            "peer_port": port["etcd_peer"],
            "client_url": f"http://{bracketed(address[host])}:{port['etcd_client']}",
            "peer_url": f"http://{bracketed(address[host])}:{port['etcd_peer']}",
            "container": container_name(name, "etcd"),
        }
        for host in groups.get("etcd", ())
    ]
    routes = {host: f"nats://{bracketed(address[host])}:{port['nats_cluster']}" for host in groups.get("nats", ())}
    nats: list[Nats] = [
        {
            "host": host,
            "address": address[host],
            "server_name": f"pdstack-{name}-{host}",
            "client_port": port["nats_client"],
            "cluster_port": port["nats_cluster"],
            "monitor_port": port["nats_monitor"],
            "url": f"nats://{bracketed(address[host])}:{port['nats_client']}",
            "route_url": routes[host],
            "routes": [url for other, url in routes.items() if other != host],
            "monitor_url": f"http://{bracketed(address[host])}:{port['nats_monitor']}",
            "container": container_name(name, "nats"),
        }
        for host in groups.get("nats", ())
    ]
    frontends: list[Frontend] = [
        {
            "host": host,
            "address": address[host],
            "port": port["frontend"],
            "url": f"http://{bracketed(address[host])}:{port['frontend']}",
            "container": container_name(name, "frontend"),
            "nats_server": nats_server(host, nats),
        }
        for host in groups.get("frontend", ())
    ]
    return {
        "name": name,
        "engine": str(settings["engine"]),
        "etcd": etcd,
        "nats": nats,
        "frontends": frontends,
        "workers": _workers(str(settings["engine"]), name, groups, hosts, address, port, nats),
        "etcd_endpoints": [member["client_url"] for member in etcd],
        "etcd_initial_cluster": ",".join(f"{member['member']}={member['peer_url']}" for member in etcd),
        "nats_servers": [server["url"] for server in nats],
    }


def _workers(
    engine: str,
    deployment: str,
    groups: Mapping[str, Sequence[str]],
    hosts: Mapping[str, Mapping[str, Any]],
    address: Mapping[str, str],
    port: Mapping[str, int],
    nats: Sequence[Nats],
) -> list[Worker]:
    workers: list[Worker] = []
    for role in ROLES:
        count = 0
        for host in groups.get(role, ()):
            for index, item in enumerate(worker_items(hosts[host], role)):
                name = str(item.get("name") or f"{role}-{count}")
                count += 1
                slot = index if role == "prefill" else DECODE_PORTS + index
                status_port = port["worker_status"] + slot
                own = engine != "trtllm"  # moves KV by this project's agent
                ends = range(KV_PATH_PORTS if role == "prefill" else 1) if own else ()
                workers.append(
                    {
                        "name": name,
                        "role": role,
                        "host": host,
                        "address": address[host],
                        "index": index,
                        "status_port": status_port,
                        "transfer_port": (
                            port["worker_ranks"] + slot * RANK_PORTS
                            if engine == "trtllm"
                            else port["worker_transfer"] + slot
                        ),
                        "stream_port": port["worker_stream"] + slot if own and role == "prefill" else 0,
                        "kv_path_ports": [port["kv_path"] + slot * KV_PATH_PORTS + number for number in ends],
                        "status_url": f"http://{bracketed(address[host])}:{status_port}",
                        "container": container_name(deployment, name),
                        "nats_server": nats_server(host, nats),
                        "engine": dict(item.get("engine") or {}),
                        "env": {str(key): str(value) for key, value in (item.get("env") or {}).items()},
                        "gpus": [int(gpu) for gpu in item.get("gpus") or ()],
                        "args": dict(item.get("args") or {}),
                    }
                )
    return sorted(workers, key=lambda worker: worker["name"])


def port_uses(topology: Topology) -> list[PortUse]:
    """Return every port the deployment listens on, host by host as the services are listed."""
    uses: list[PortUse] = []

    def add(entry: Etcd | Nats | Frontend | Worker, port: int, service: str) -> None:
        uses.append(
            {"host": entry["host"], "address": entry["address"], "port": port, "service": service,
             "container": entry["container"]}
        )  # fmt: skip

    for member in topology["etcd"]:
        add(member, member["client_port"], "etcd (client)")
        add(member, member["peer_port"], "etcd (peer)")
    for server in topology["nats"]:
        add(server, server["client_port"], "NATS (client)")
        if server["routes"]:
            add(server, server["cluster_port"], "NATS (cluster)")
        add(server, server["monitor_port"], "NATS (monitor)")
    for frontend in topology["frontends"]:
        add(frontend, frontend["port"], "frontend")
    for worker in topology["workers"]:
        add(worker, worker["status_port"], f"worker {worker['name']} (status)")
        if topology["engine"] == "trtllm":
            for rank in range(len(worker["gpus"])):
                add(worker, worker["transfer_port"] + rank, f"worker {worker['name']} (rank {rank})")
        # A decode worker of the reference engine calls the prefill workers and listens on nothing else.
        elif worker["role"] == "prefill":
            add(worker, worker["transfer_port"], f"worker {worker['name']} (transfer)")
            add(worker, worker["stream_port"], f"worker {worker['name']} (stream)")
        for number in worker["kv_path_ports"]:
            add(worker, number, f"worker {worker['name']} (step kv_path)")
    return uses
