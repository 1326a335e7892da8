"""A package repository as data, and the files that make it known to apt or dnf.

An entry of the inventory's `gpu_repositories` has a key for each format it serves:

    deb: {uri, suite, components, key}            `key`: where the signing key is (URL, file: too); empty: unsigned
    rpm: {baseurl, gpgkey, gpgcheck, repo_gpgcheck}

Values may hold {id} (ubuntu, debian, rhel, rocky), {version} (24.04, 12, 9), {major}, {codename}, {arch} (the package
manager's word: amd64, x86_64) and {machine} (uname's word), so that one entry serves every distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

DEB_WORDS = {"x86_64": "amd64", "aarch64": "arm64"}
# ID of os-release -> package format. What is not here is not supported by the roles of GPU hosts.
FORMATS = {"ubuntu": "deb", "debian": "deb", "rhel": "rpm", "rocky": "rpm", "almalinux": "rpm", "centos": "rpm"}
# The rebuilds take the packages of what they rebuild.
LIKE = {"rocky": "rhel", "almalinux": "rhel", "centos": "rhel"}


class PlanError(ValueError):
    """No plan for this host; the text says what was found, what was wanted and the fix."""


class System(TypedDict):
    """What of a host decides about packages."""

    id: str
    version: str
    codename: str
    machine: str
    kernel: str
    manager: str


class File(TypedDict):
    """A file to write."""

    path: str
    content: str


class Repository(TypedDict):
    """What makes a repository known: its file, and the key to fetch first (empty url: none)."""

    file: File
    key: dict[str, str]


def system(facts: Mapping[str, Any]) -> System:
    """Return the system out of Ansible's facts (distribution, distribution_version, distribution_release, ...)."""
    words = {"redhat": "rhel", "red hat enterprise linux": "rhel"}
    name = str(facts["distribution"]).lower()
    return {
        "id": words.get(name, name),
        "version": str(facts["distribution_version"]),
        "codename": str(facts.get("distribution_release", "")),
        "machine": str(facts["architecture"]),
        "kernel": str(facts.get("kernel", "")),
        "manager": str(facts.get("pkg_mgr", "")),
    }


def package_format(host: System) -> str:
    """Return deb or rpm; PlanError for a distribution that nobody wrote a plan for."""
    if host["id"] not in FORMATS:
        raise PlanError(
            f"distribution {host['id']} {host['version']}: no package plan; wanted Ubuntu 22.04 or 24.04, Debian 12, "
            "or RHEL/Rocky 9. Install by hand and set the role's `manage` variable to false"
        )
    return FORMATS[host["id"]]


def fill(text: str, host: System) -> str:
    """Return `text` with its {words} replaced; PlanError for a word that does not exist."""
    deb = package_format(host) == "deb"
    words = {
        "id": LIKE.get(host["id"], host["id"]),
        "version": host["version"] if host["id"] == "ubuntu" else host["version"].split(".")[0],
        "major": host["version"].split(".")[0],
        "codename": host["codename"],
        "arch": DEB_WORDS.get(host["machine"], host["machine"]) if deb else host["machine"],
        "machine": host["machine"],
    }
    try:
        return text.format(**words)
    except (KeyError, IndexError) as error:
        raise PlanError(
            f"repository {text!r}: found the word {error}, wanted some of {', '.join(words)}. Correct gpu_repositories"
        ) from None


def repository(name: str, entry: Mapping[str, Any], host: System) -> Repository:
    """Return the files of the repository `name`; PlanError when `entry` does not serve the host's package format."""
    wanted = package_format(host)
    if not isinstance(entry.get(wanted), Mapping):
        raise PlanError(
            f"repository {name}: found {', '.join(sorted(entry)) or 'nothing'}, wanted its `{wanted}` entry for "
            f"{host['id']} {host['version']}. Add it to gpu_repositories in the inventory"
        )
    return _deb(name, entry[wanted], host) if wanted == "deb" else _rpm(name, entry[wanted], host)


def _deb(name: str, entry: Mapping[str, Any], host: System) -> Repository:
    key = fill(str(entry.get("key", "")), host)
    # apt takes an armoured key by its file's name, so nothing has to convert it.
    ring = f"/etc/apt/keyrings/{name}{'.gpg' if key.endswith('.gpg') else '.asc'}" if key else ""
    suite = fill(str(entry.get("suite", "/")), host)
    lines = ["# Written by pdstack.", "Types: deb", f"URIs: {fill(str(entry['uri']), host)}", f"Suites: {suite}"]
    # A flat repository (a suite that ends in a slash) has no components.
    lines += [] if suite.endswith("/") else [f"Components: {' '.join(entry.get('components', ['main']))}"]
    lines += [f"Architectures: {DEB_WORDS.get(host['machine'], host['machine'])}"]
    lines += [f"Signed-By: {ring}"] if ring else []
    path = f"/etc/apt/sources.list.d/{name}.sources"
    return {"file": {"path": path, "content": "\n".join(lines) + "\n"}, "key": {"url": key, "path": ring}}


def _rpm(name: str, entry: Mapping[str, Any], host: System) -> Repository:
    lines = [f"[{name}]", f"name={name}", f"baseurl={fill(str(entry['baseurl']), host)}", "enabled=1"]
    lines += [
        f"{option}={int(bool(entry.get(option, option == 'gpgcheck')))}" for option in ("gpgcheck", "repo_gpgcheck")
    ]
    if entry.get("gpgkey"):
        lines.append(f"gpgkey={fill(str(entry['gpgkey']), host)}")
    content = "# Written by pdstack.\n" + "\n".join(lines) + "\n"
    return {"file": {"path": f"/etc/yum.repos.d/{name}.repo", "content": content}, "key": {"url": "", "path": ""}}


def versioned(packages: tuple[str, ...] | list[str], version: str, host: System) -> list[str]:
    """Return the packages with one version on all, as the host's package manager writes it."""
    separator = "=" if package_format(host) == "deb" else "-"
    return [f"{name}{separator}{version}" for name in packages] if version else list(packages)


def preferences(packages: tuple[str, ...] | list[str], version: str) -> str:
    """Return an apt preferences file that keeps `packages` at `version` (a hold would stop the next run of ours)."""
    return f"Package: {' '.join(packages)}\nPin: version {version}\nPin-Priority: 1001\n"
