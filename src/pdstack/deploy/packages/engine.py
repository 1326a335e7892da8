"""Which container engine a host gets, from where: the distribution's where it is new enough, Docker's own otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from pdstack.deploy.packages import repository
from pdstack.deploy.packages.repository import PlanError, Repository, System

NAME = "docker-ce"
SOURCES = ("auto", "distribution", "docker")
DOCKER_PACKAGES = ("docker-ce", "docker-ce-cli", "containerd.io", "docker-buildx-plugin")
# What Docker's packages cannot be installed beside, by format. Podman itself may stay.
CONFLICTS = {
    "deb": ("docker.io", "docker-cli", "docker-compose", "docker-compose-v2", "docker-doc", "docker-buildx",
            "podman-docker", "containerd", "runc"),
    "rpm": ("docker", "docker-client", "docker-common", "docker-latest", "docker-engine", "moby-engine",
            "podman-docker", "containerd", "runc"),
}  # fmt: skip
# Docker's repository has had this release for every distribution here; what is installed is its newest.
DOCKER_AT_LEAST = "27.0"
# What a distribution's release came with, for a host that cannot say what it would install now.
SHIPPED = {
    ("debian", "12"): "20.10",
    ("debian", "13"): "26.1",
    ("ubuntu", "22.04"): "20.10",
    ("ubuntu", "24.04"): "24.0",
}
# Keys of daemon.json whose flag has another name; the engine refuses to start when it finds both.
FLAGS = {
    "runtimes": "add-runtime",
    "exec-opts": "exec-opt",
    "features": "feature",
    "hosts": "host",
    "insecure-registries": "insecure-registry",
    "registry-mirrors": "registry-mirror",
    "labels": "label",
    "log-opts": "log-opt",
    "storage-opts": "storage-opt",
    "default-ulimits": "default-ulimit",
    "dns-opts": "dns-opt",
}


class Plan(TypedDict):
    """What to install and what to remove first; `expected` is a version the engine will at least have."""

    source: str
    packages: list[str]
    conflicts: list[str]
    repository: Repository | None
    expected: str


def upstream(version: str) -> tuple[int, ...]:
    """Return the numbers that a package's version begins with, without epoch: 5:27.3.1-1~ubuntu -> (27, 3, 1)."""
    found = re.match(r"(?:\d+:)?v?(\d+(?:\.\d+)*)", version.strip())
    return tuple(int(part) for part in found[1].split(".")) if found else ()


def candidate(policy: str) -> str:
    """Return the candidate out of the text of `apt-cache policy PACKAGE`; empty where there is none."""
    found = re.search(r"^ *Candidate: (\S+)$", policy, re.MULTILINE)
    return found[1] if found and found[1] != "(none)" else ""


def distribution_packages(host: System, apparmor: bool) -> list[str]:
    """Return the distribution's own engine, empty where it has none (RHEL 9 and its rebuilds)."""
    if host["manager"] != "apt":
        known = host["manager"].startswith("dnf") and host["id"] not in repository.FORMATS
        return ["moby-engine"] if known else []
    # Debian has shipped the client in a package of its own since 13, Ubuntu never did. AppArmor's parser is needed
    # wherever the kernel enforces AppArmor.
    split = host["id"] == "debian" and upstream(host["version"]) >= (13,)
    return ["docker.io", *(["docker-cli"] if split else []), *(["apparmor"] if apparmor else [])]


def plan(
    host: System,
    *,
    source: str = "auto",
    minimum: str = "",
    candidate: str = "",
    apparmor: bool = False,
    repositories: Mapping[str, Any] | None = None,
) -> Plan:
    """Return what brings an engine of at least `minimum` (empty: any) to `host`.

    `candidate` is the version that the distribution would install (empty: the host cannot say), `repositories` the
    inventory's gpu_repositories. PlanError says why there is no way.
    """
    if source not in SOURCES:
        raise PlanError(
            f"container_engine__source: found {source!r}, wanted one of {', '.join(SOURCES)}. Set one of them"
        )
    own = distribution_packages(host, apparmor)
    release = host["version"] if host["id"] == "ubuntu" else host["version"].split(".")[0]
    shipped = candidate or SHIPPED.get((host["id"], release), "")
    enough = bool(own) and (not minimum or upstream(shipped) >= upstream(minimum))
    if source == "distribution" or (source == "auto" and enough):
        if not own:
            raise PlanError(
                f"container engine: found {host['id']} {host['version']}, which ships no Docker; wanted an engine. Set "
                "container_engine__source: docker, or install Docker by hand"
            )
        if not enough:
            raise PlanError(
                f"container engine: found Docker {shipped or '(unknown)'} in {host['id']} {host['version']}, wanted "
                f"{minimum} or later. Set container_engine__source: auto"
            )
        return {"source": "distribution", "packages": own, "conflicts": [], "repository": None, "expected": shipped}
    # A newer release than the least can only be asked of a repository that has its newest.
    expected = max(minimum, DOCKER_AT_LEAST, key=upstream)
    return {
        "source": "docker",
        "packages": [*DOCKER_PACKAGES, *(["apparmor"] if apparmor and "apparmor" in own else [])],
        "conflicts": list(CONFLICTS[repository.package_format(host)]),
        "repository": repository.repository(NAME, (repositories or {}).get("docker", {}), host),
        "expected": expected,
    }


def expected(host: System, **known: Any) -> str:
    """Return the version that `plan` promises; empty where it has no way."""
    try:
        return plan(host, **known)["expected"]
    except PlanError:
        return ""


def flag_conflicts(flags: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """Return the keys of `settings` that the unit's dockerd `flags` give as well; the engine would not start."""
    given = {flag.lstrip("-").split("=")[0] for flag in flags if flag.startswith("--")}
    # A drop-in's short form of --host.
    given |= {"host"} if any(flag.startswith("-H") for flag in flags) else set()
    return sorted(key for key in settings if FLAGS.get(key, key) in given)
