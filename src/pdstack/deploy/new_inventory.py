"""Write an inventory for the hosts that you name: `python -m pdstack.deploy.new_inventory NAME --hosts h1,h2 ...`.

Services and workers are spread over the hosts. What cannot work (more GPUs than there are, a fabric of one host over
several, an even number of etcd members) is refused before anything is written.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pdstack.deploy import validate
from pdstack.deploy.problem import Problem

ROOT = Path(__file__).resolve().parents[3]
MODEL = "Qwen/Qwen3-0.6B"
REVISION = "c1899de289a04d12100db370d81485cdf75e47ca"
HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Directories of inventories/ that are no deployment of a site.
ITS_OWN = ("common", "local", "lab", "single_node", "cluster")


@dataclass
class Host:
    """One host: where it is, its GPUs (none: it runs services only), and the workers on it."""

    name: str
    address: str = ""
    gpus: int = 0
    workers: dict[str, list[list[int]]] = field(default_factory=lambda: {"prefill": [], "decode": []})

    @property
    def free(self) -> list[int]:
        """The GPUs that no worker has."""
        taken = {gpu for lists in self.workers.values() for gpus in lists for gpu in gpus}
        return [gpu for gpu in range(self.gpus) if gpu not in taken]


class Refused(Exception):
    """The inventory cannot be made; the text says what, found, wanted and fix."""

    def __init__(self, *found: Problem) -> None:
        lines = [f"- {p.what}\n     found:  {p.found}\n     wanted: {p.wanted}\n     fix:    {p.fix}" for p in found]
        super().__init__("\n".join(["No inventory was written.", *lines]))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="nox -s new_inventory --", description=(__doc__ or "").splitlines()[0])
    add = made.add_argument
    add("name", help="of the inventory (inventories/NAME) and of the deployment")
    add("--hosts", required=True, help="GPU hosts: name or name=address, separated by commas")
    add("--service-hosts", default="", help="hosts without GPUs, which then run etcd, NATS and frontends")
    add("--prefill", type=int, required=True, metavar="N", help="prefill workers")
    add("--decode", type=int, required=True, metavar="M", help="decode workers")
    add("--gpus-per-host", type=int, default=8, metavar="G", help="GPUs of each GPU host (default: 8)")
    add("--tp-prefill", type=int, default=1, metavar="K", help="GPUs of a prefill worker (default: 1)")
    add("--tp-decode", type=int, default=1, metavar="L", help="GPUs of a decode worker (default: 1)")
    add("--etcd", type=int, metavar="E", help="etcd members: 1, 3 or 5 (default: 3 with three hosts or more)")
    add("--nats", type=int, metavar="S", help="NATS servers: 1, 3 or 5 (default: 3 with three hosts or more)")
    add("--frontends", type=int, metavar="F", help="frontends (default: 2 with two hosts or more)")
    add("--fabric", default="", help="kv_fabric; with workers on one host nvlink_single, else it must be named")
    add("--backend", default="ucx", choices=("ucx", "nixl"), help="kv_transfer_backend (default: ucx)")
    add("--net-devices", default="", help="RDMA devices of a GPU host with their port: mlx5_0:1,mlx5_1:1")
    add("--interface", default="", help="network interface that carries KV's control connections (kv_interface)")
    add("--model", default=MODEL, help=f"owner/name of the hub, or a directory of the hosts (default: {MODEL})")
    add("--model-revision", default="", help="commit of the model, 40 hex digits")
    add("--image", default="", help="prebuilt runtime image, pinned; without it the image is built")
    add("--directory", type=Path, default=ROOT / "inventories", help=argparse.SUPPRESS)
    return made


def hosts_of(text: str, gpus: int) -> list[Host]:
    """Return the hosts of a list such as `h1=10.0.0.1,h2`."""
    pairs = [item.strip().partition("=") for item in text.split(",") if item.strip()]
    return [Host(name.strip(), address.strip(), gpus) for name, _, address in pairs]


def place(hosts: Sequence[Host], wanted: Mapping[str, tuple[int, int]]) -> None:
    """Give every worker its GPUs on one of `hosts`; `wanted` is (workers, GPUs each) by role. Raises Refused.

    The largest come first, each to the host with the most GPUs left: roles and load are spread.
    """
    there = sum(host.gpus for host in hosts)
    needed = sum(count * size for count, size in wanted.values())
    said = " and ".join(f"{count} {role} workers of {size}" for role, (count, size) in wanted.items())
    for role, (count, size) in wanted.items():
        if count < 1 or size < 1:
            raise Refused(
                Problem(f"{role} workers", f"{count} workers of {size} GPUs", "at least one of each", "raise it")
            )
    largest = max(host.gpus for host in hosts)
    for role, (_, size) in wanted.items():
        if size > largest:
            raise Refused(
                Problem(
                    f"--tp-{role}", f"{size} GPUs a worker", f"at most {largest}, the GPUs of a host",
                    "lower it: a worker is one container on one host",
                )
            )  # fmt: skip
    if needed > there:
        raise Refused(
            Problem(
                "GPUs", f"{needed} wanted ({said}), {there} there ({len(hosts)} hosts)", f"at most {there}",
                "name more --hosts, correct --gpus-per-host, or take fewer or smaller workers",
            )
        )  # fmt: skip
    order = sorted(wanted, key=lambda role: -wanted[role][1])
    for role in order:
        count, size = wanted[role]
        for _ in range(count):
            host = max(hosts, key=lambda each: len(each.free))
            if len(host.free) < size:
                raise Refused(
                    Problem(
                        "GPUs", f"{said} on {len(hosts)} hosts of {largest}", "every worker's GPUs on one host",
                        f"choose sizes that divide {largest}: what is left of each host is too small for a worker",
                    )
                )  # fmt: skip
            host.workers[role].append(host.free[:size])


def members(hosts: Sequence[Host], count: int, what: str) -> list[str]:
    """Return the hosts that run `count` of a service: those without workers first. Raises Refused."""
    if not 1 <= count <= len(hosts):
        raise Refused(
            Problem(
                what, str(count), f"1 to {len(hosts)}, the hosts that are named", "name more hosts, or take fewer",
            )
        )  # fmt: skip
    ranked = sorted(hosts, key=lambda host: sum(map(len, host.workers.values())))
    chosen = {host.name for host in ranked[:count]}
    return [host.name for host in hosts if host.name in chosen]


@dataclass
class Plan:
    """What is written: settings (group_vars/all.yml), hosts with their variables, groups."""

    settings: dict[str, Any]
    hosts: dict[str, dict[str, Any]]
    groups: dict[str, list[str]]


def plan(options: argparse.Namespace) -> Plan:
    """Return the inventory that the command line asks for. Raises Refused."""
    gpu_hosts = hosts_of(options.hosts, options.gpus_per_host)
    others = hosts_of(options.service_hosts, 0)
    everyone = [*others, *gpu_hosts]
    names = [host.name for host in everyone]
    if not gpu_hosts or options.gpus_per_host < 1:
        raise Refused(Problem("--hosts", "no GPU host", "at least one with one GPU", "name the GPU hosts"))
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise Refused(Problem("hosts", f"twice: {', '.join(twice)}", "each host once", "remove one of the two"))
    if wrong := [name for name in names if not HOST_NAME.fullmatch(name)]:
        raise Refused(
            Problem("hosts", ", ".join(map(repr, wrong)), "names of letters, digits, dots and -", "write name=address")
        )
    sizes = {"prefill": (options.prefill, options.tp_prefill), "decode": (options.decode, options.tp_decode)}
    place(gpu_hosts, sizes)
    working = [host for host in gpu_hosts if any(host.workers.values())]
    fabric = options.fabric or ("nvlink_single" if len(working) == 1 else "")
    if not fabric:
        raise Refused(
            Problem(
                "--fabric", f"nothing, and workers on {len(working)} hosts", "what joins the hosts",
                "name ib, roce, ib_rails, nvlink_multi, nvlink_domains, or tcp (slow: for trials)",
            )
        )  # fmt: skip
    several = len(everyone)
    path = options.model.startswith("/")
    revision = options.model_revision or (REVISION if options.model == MODEL else "")
    settings: dict[str, Any] = {
        "pdstack_name": options.name.replace("_", "-"),
        "engine": "trtllm",
        "model_source": "path" if path else "hub",
        "model_ref": options.model,
        **({} if path else {"model_revision": revision}),
        "model_name": options.model.rstrip("/").rpartition("/")[2].lower(),
        "kv_transfer_backend": options.backend,
        "kv_fabric": fabric,
        "trtllm_image_source": "registry" if options.image else "build",
        **({"trtllm_image": options.image} if options.image else {}),
    }
    shared: dict[str, Any] = {"gpu_count": options.gpus_per_host}
    if devices := [item.strip() for item in options.net_devices.split(",") if item.strip()]:
        shared["kv_net_devices"] = devices
    if options.interface:
        shared["kv_interface"] = options.interface
    hosts = {}
    for host in everyone:
        variables: dict[str, Any] = {"ansible_host": host.address} if host.address else {}
        if host.name == "localhost" and not host.address:
            variables["ansible_connection"] = "local"
        if any(host.workers.values()):
            variables |= shared
        for role, lists in host.workers.items():
            if lists:
                variables[f"{role}_workers"] = [{"gpus": gpus} for gpus in lists]
        hosts[host.name] = variables
    return Plan(
        settings,
        hosts,
        {
            "etcd": members(everyone, options.etcd or (3 if several >= 3 else 1), "--etcd"),
            "nats": members(everyone, options.nats or (3 if several >= 3 else 1), "--nats"),
            "frontend": members(everyone, options.frontends or min(2, several), "--frontends"),
            **{role: [host.name for host in gpu_hosts if host.workers[role]] for role in ("prefill", "decode")},
        },
    )


def check(made: Plan) -> None:
    """Raise Refused with what `validate` would say of the inventory."""
    common: dict[str, Any] = {}
    for file in sorted((ROOT / "inventories/common/group_vars/all").glob("*.yml")):
        common |= yaml.safe_load(file.read_text())
    settings = {key: common[key] for key in common["pdstack_settings"]} | made.settings
    kept = ("engine_settings", "prefill_workers", "decode_workers")
    used = {name for names in made.groups.values() for name in names}
    hosts = {
        name: {key: common[key] for key in kept} | made.settings | variables
        for name, variables in made.hosts.items()
        if name in used
    }
    if found := validate.problems(made.groups, hosts, settings):
        raise Refused(*found)


def flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    return (
        str(yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)).removesuffix("...\n").strip()
    )


def hosts_file(made: Plan, command: Sequence[str]) -> str:
    """Return hosts.yml."""
    notes = {
        "etcd": "1, 3 or 5 members. Of three, one may be lost.",
        "nats": "1, 3 or 5 servers. A client that loses its server goes on with another.",
        "frontend": "Each answers for the whole deployment; put a load balancer of yours in front of several.",
        "prefill": "Prefill workers, by the lists above.",
        "decode": "Decode workers, by the lists above.",
    }
    lines = [
        "---",
        "# Written by `nox -s new_inventory`; edit it as you like. It was made with",
        *textwrap.wrap(
            " ".join(command),
            116,
            initial_indent="#   ",
            subsequent_indent="#     ",
            break_long_words=False,
            break_on_hyphens=False,
        ),
        "# Settings are in group_vars/all.yml, all there are with their meaning in inventories/common/group_vars/all.",
        "all:",
        "  hosts:",
        "    # ansible_host: where Ansible reaches the host (without it: its name). pdstack_address: where the other",
        "    # hosts reach it, if that is another one. gpu_count: the GPUs it has. *_workers: an entry per worker with",
        "    # its GPUs, counted from 0 as nvidia-smi does; more in an entry: name, engine, args, env.",
    ]
    for name, variables in made.hosts.items():
        lines.append(f"    {name}:" + ("" if variables else " {}"))
        lines += [f"      {key}: {flow(value)}" for key, value in variables.items()]
    lines += ["", "  # A host runs what it is in the groups of.", "  children:"]
    for group, names in made.groups.items():
        lines += [f"    # {notes[group]}", f"    {group}:", "      hosts:"]
        lines += [f"        {name}:" for name in names]
    return "\n".join([*lines, ""])


def settings_file(made: Plan) -> str:
    """Return group_vars/all.yml."""
    notes = {
        "pdstack_name": "Prefixes containers and directories of the deployment.",
        "model_source": "hub: every host fetches the model at this commit | path: a directory that every host has.",
        "model_name": 'What clients put into "model".',
        "kv_transfer_backend": "ucx | nixl (beta).",
        "kv_fabric": "What carries KV; the profiles are in inventories/common/group_vars/all/fabrics.yml.",
        "trtllm_image_source": "build | registry (trtllm_image, pinned) | archive (trtllm_archive, of `docker save`).",
    }
    lines = ["---"]
    for key, value in made.settings.items():
        lines += [f"# {notes[key]}"] if key in notes else []
        lines.append(f"{key}: {flow(value)}")
    return "\n".join([*lines, ""])


def write(options: argparse.Namespace, command: Sequence[str]) -> Path:
    """Write the inventory and return its directory. Raises Refused before anything is written."""
    folder: Path = options.directory / options.name
    if not validate.NAME.fullmatch(options.name.replace("_", "-")):
        wanted = "1 to 32 of a-z, 0-9, _ and -, beginning and ending with a letter or digit"
        raise Refused(Problem("NAME", repr(options.name), wanted, "choose another name"))
    if options.name in ITS_OWN or folder.exists():
        raise Refused(
            Problem(
                "NAME", f"inventories/{options.name} exists", "a name that is free",
                "choose another, or remove that directory (destroy what it deployed first)",
            )
        )  # fmt: skip
    made = plan(options)
    check(made)
    (folder / "group_vars").mkdir(parents=True)
    (folder / "hosts.yml").write_text(hosts_file(made, command))
    (folder / "group_vars/all.yml").write_text(settings_file(made))
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(given)
    try:
        folder = write(options, ["nox -s new_inventory --", *given])
    except Refused as error:
        sys.stderr.write(f"{error}\n")
        return 1
    shown = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    sys.stdout.write(
        f"{shown}/hosts.yml and {shown}/group_vars/all.yml are written. Next:\n"
        f"  nox -s doctor -- -i {shown}             what is wrong with the hosts, before anything is changed\n"
        f"  nox -s deploy -- -i {shown} --check     a rehearsal, to the end\n"
        f"  nox -s deploy -- -i {shown}\n"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
