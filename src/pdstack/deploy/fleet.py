"""What can be known to be wrong between the hosts of an inventory: addresses, and what must be the same everywhere."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pdstack.deploy.problem import Problem, by_value, show
from pdstack.deploy.service import MAX_HOSTNAME
from pdstack.deploy.topology import ROLES, container_name, host_address, worker_items

Groups = Mapping[str, Sequence[str]]
Hosts = Mapping[str, Mapping[str, Any]]

ADDRESS = re.compile(r"[A-Za-z0-9_.:%-]+")
# Linux's limit for the name of a network interface.
INTERFACE = re.compile(r"[^\s/:]{1,15}")
# A deployment has one value of each: set for some hosts only, two parts of it would not fit together.
ONE_VALUE = (
    "pdstack_name", "pdstack_port_offset", "pdstack_ports", "engine", "model_source", "model_ref", "model_revision",
    "model_name", "router_mode", "trtllm_engine", "trtllm_args", "trtllm_max_input_tokens", "trtllm_image_source",
    "trtllm_image", "coordination_image",
)  # fmt: skip
# The same for what the workers of both roles must agree on.
WORKERS_AGREE = {
    "kv_transfer_backend": "two workers that use different backends cannot move KV between each other",
    "kv_transfer_path": "decode can take only a path that prefill offers",
    "kv_fabric": "both ends of a transfer use one profile; UCX would find no transport that both have",
}
# RFC 5737: examples in documentation, of which no network is made.
PLACEHOLDERS = tuple(ipaddress.ip_network(net) for net in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"))


def worker_hosts(groups: Groups) -> list[str]:
    """Return the hosts that run workers, in the order of the inventory."""
    return list(dict.fromkeys(host for role in ROLES for host in groups.get(role, ())))


def problems(groups: Groups, hosts: Hosts, settings: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong between the hosts; the arguments are those of `validate.problems`."""
    workers = {host: hosts[host] for host in worker_hosts(groups) if host in hosts}
    return [
        *_addresses(hosts),
        *_one_value(hosts),
        *_agree(workers),
        *_interfaces(workers),
        *_one_host_fabrics(workers, settings),
        *_names(groups, hosts, settings),
    ]


def placeholders(hosts: Hosts) -> list[str]:
    """Return a sentence that names the hosts whose address is still an example's; empty without any."""
    found = [
        f"{host} ({host_address(host, variables)})"
        for host, variables in hosts.items()
        if any(_within(host_address(host, variables), net) for net in PLACEHOLDERS)
    ]
    if not found:
        return []
    return [
        f"addresses of examples, which no network has: {', '.join(found)}; set ansible_host of each "
        "(and pdstack_address where the hosts reach each other at another one)"
    ]


def _within(address: str, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    try:
        return ipaddress.ip_address(address) in network
    except ValueError:
        return False


def _addresses(hosts: Hosts) -> Iterator[Problem]:
    seen: dict[str, list[str]] = {}
    for host, variables in hosts.items():
        address = host_address(host, variables)
        seen.setdefault(address, []).append(host)
        if not ADDRESS.fullmatch(address):
            yield Problem(
                f"address of {host}", show(address), "an IP address or a host name",
                f"correct pdstack_address (or ansible_host) of {host}",
            )  # fmt: skip
    for address, names in seen.items():
        if len(names) > 1:
            yield Problem(
                f"address {address}", f"{len(names)} hosts ({', '.join(names)})", "one host behind an address",
                "give each its own pdstack_address or ansible_host; a host that does several things is one host in "
                "several groups",
            )  # fmt: skip
        elif len(hosts) > 1 and not _reachable(address):
            others = [host for host in hosts if host != names[0]]
            yield Problem(
                f"address of {names[0]}", address, f"one that {', '.join(others)} can reach",
                f"set pdstack_address of {names[0]} to its address in the network of the others",
            )  # fmt: skip


def _reachable(address: str) -> bool:
    if address == "localhost":
        return False
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return True
    return not (known.is_loopback or known.is_unspecified)


def _one_value(hosts: Hosts) -> Iterator[Problem]:
    for key in ONE_VALUE:
        yield from _same(key, hosts, "the whole deployment", "it is one deployment")


def _agree(workers: Hosts) -> Iterator[Problem]:
    for key, reason in WORKERS_AGREE.items():
        yield from _same(key, workers, "all hosts of prefill and decode", reason)
    known = {host: variables for host, variables in workers.items() if variables.get("kv_mtu") is not None}
    yield from _same(
        "kv_mtu",
        known,
        "all hosts of prefill and decode",
        "packets that are too large for a peer are lost, and large transfers stall",
    )


def _same(key: str, hosts: Hosts, where: str, reason: str) -> Iterator[Problem]:
    values = [*by_value(hosts, key)]
    if len(values) > 1:
        yield Problem(
            f"{key} of the hosts", "; ".join(f"{show(value)} on {', '.join(names)}" for value, names in values),
            f"one value for {where}: {reason}", f"set {key} once, under all: vars or in group_vars/all.yml",
        )  # fmt: skip


def _interfaces(workers: Hosts) -> Iterator[Problem]:
    for value, names in by_value(workers, "kv_interface"):
        if value is not None and not (isinstance(value, str) and (not value or INTERFACE.fullmatch(value))):
            yield Problem(
                f"kv_interface on {', '.join(names)}", show(value), "the name of a network interface, for example eth0",
                "set it to a name of `ip -brief link` on the host; RDMA devices (mlx5_0:1) go into kv_net_devices",
            )  # fmt: skip


def _one_host_fabrics(workers: Hosts, settings: Mapping[str, Any]) -> Iterator[Problem]:
    """A fabric whose transports read the memory of other processes cannot leave a host."""
    fabrics = settings.get("kv_fabrics")
    if len(workers) < 2 or not isinstance(fabrics, Mapping):
        return
    for name, _ in by_value(workers, "kv_fabric"):
        profile = fabrics.get(name) if isinstance(name, str) else None
        if not isinstance(profile, Mapping):
            continue
        if profile.get("scope") == "host" or profile.get("transports") == ["cma"]:
            others = "nvlink_multi, ib, roce or tcp" if settings.get("engine") == "trtllm" else "tcp"
            yield Problem(
                f"kv_fabric {name}", f"workers on {', '.join(sorted(workers))}",
                "all workers on one host: its transport reads the memory of processes of the same host",
                f"set kv_fabric: {others}, or put prefill and decode on one host",
            )  # fmt: skip


def _names(groups: Groups, hosts: Hosts, settings: Mapping[str, Any]) -> Iterator[Problem]:
    for role in ROLES:
        count = 0
        for host in groups.get(role, ()):
            for item in worker_items(hosts[host], role):
                name = container_name(str(settings.get("pdstack_name")), str(item.get("name") or f"{role}-{count}"))
                count += 1
                if len(name) > MAX_HOSTNAME:
                    yield Problem(
                        f"container {name}", f"a name of {len(name)} characters",
                        f"at most {MAX_HOSTNAME}: it is the container's hostname too",
                        "choose a shorter pdstack_name, or a shorter name for the worker",
                    )  # fmt: skip
