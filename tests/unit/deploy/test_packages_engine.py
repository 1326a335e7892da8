from __future__ import annotations

from typing import Any

import pytest

from pdstack.deploy.packages import engine, repository
from pdstack.deploy.packages.repository import PlanError

REPOSITORIES = {
    "docker": {
        "deb": {
            "uri": "https://docker.example/linux/{id}",
            "suite": "{codename}",
            "components": ["stable"],
            "key": "https://docker.example/linux/{id}/gpg",
        },
        "rpm": {"baseurl": "https://docker.example/linux/{id}/{major}/{machine}/stable", "gpgkey": "https://docker.example/gpg"},
    }
}  # fmt: skip
CE = ["docker-ce", "docker-ce-cli", "containerd.io", "docker-buildx-plugin"]


def system(name: str, version: str, release: str = "", **changed: Any) -> repository.System:
    facts = {"distribution": name, "distribution_version": version, "distribution_release": release}
    manager = "apt" if name in ("Debian", "Ubuntu", "Linux Mint") else "dnf"
    return repository.system(facts | {"architecture": "x86_64", "pkg_mgr": manager} | changed)


BOOKWORM = system("Debian", "12.11", "bookworm")
NOBLE = system("Ubuntu", "24.04", "noble")


@pytest.mark.parametrize(
    ("host", "apparmor", "packages"),
    [
        (BOOKWORM, False, ["docker.io"]),
        (BOOKWORM, True, ["docker.io", "apparmor"]),
        (system("Debian", "13.1", "trixie"), False, ["docker.io", "docker-cli"]),
        (NOBLE, True, ["docker.io", "apparmor"]),
        (system("Linux Mint", "22"), False, ["docker.io"]),
        (system("Fedora", "42"), False, ["moby-engine"]),
    ],
)
def test_any_version_is_the_distribution_s(host: repository.System, apparmor: bool, packages: list[str]) -> None:
    plan = engine.plan(host, apparmor=apparmor)
    assert (plan["source"], plan["packages"], plan["repository"]) == ("distribution", packages, None)


@pytest.mark.parametrize(
    ("host", "minimum", "candidate", "source"),
    [
        (BOOKWORM, "23.0", "20.10.24+dfsg1-1+deb12u1", "docker"),
        (BOOKWORM, "23.0", "", "docker"),
        (NOBLE, "23.0", "28.2.2-0ubuntu1~24.04.1", "distribution"),
        (NOBLE, "25.0", "", "docker"),
        (NOBLE, "25.0", "28.2.2-0ubuntu1~24.04.1", "distribution"),
        (system("Ubuntu", "22.04", "jammy"), "25.0", "20.10.12-0ubuntu4", "docker"),
    ],
)
def test_docker_s_own_where_the_distribution_s_is_too_old(
    host: repository.System, minimum: str, candidate: str, source: str
) -> None:
    plan = engine.plan(host, minimum=minimum, candidate=candidate, repositories=REPOSITORIES)
    assert plan["source"] == source
    assert engine.upstream(plan["expected"]) >= engine.upstream(minimum)


def test_docker_on_debian() -> None:
    plan = engine.plan(BOOKWORM, source="docker", apparmor=True, repositories=REPOSITORIES)
    assert plan["packages"] == [*CE, "apparmor"]
    assert {"docker.io", "containerd", "runc"} <= set(plan["conflicts"])
    assert plan["repository"] == {
        "file": {
            "path": "/etc/apt/sources.list.d/docker-ce.sources",
            "content": "# Written by pdstack.\nTypes: deb\nURIs: https://docker.example/linux/debian\n"
            "Suites: bookworm\nComponents: stable\nArchitectures: amd64\nSigned-By: /etc/apt/keyrings/docker-ce.asc\n",
        },
        "key": {"url": "https://docker.example/linux/debian/gpg", "path": "/etc/apt/keyrings/docker-ce.asc"},
    }


@pytest.mark.parametrize(("name", "version"), [("Rocky", "9.6"), ("RedHat", "9.4")])
def test_rhel_has_no_engine_of_its_own(name: str, version: str) -> None:
    plan = engine.plan(system(name, version), repositories=REPOSITORIES)
    assert plan["packages"] == CE
    assert "podman" not in plan["conflicts"]
    assert plan["repository"] is not None
    assert plan["repository"]["file"]["path"] == "/etc/yum.repos.d/docker-ce.repo"
    assert "baseurl=https://docker.example/linux/rhel/9/x86_64/stable\n" in plan["repository"]["file"]["content"]
    assert "gpgcheck=1\n" in plan["repository"]["file"]["content"]


@pytest.mark.parametrize(
    ("host", "options", "told"),
    [
        (BOOKWORM, {"source": "distribution", "minimum": "23.0"}, "found Docker 20.10 in debian"),
        (system("Rocky", "9.6"), {"source": "distribution"}, "ships no Docker"),
        (system("Rocky", "9.6"), {}, "wanted its `rpm` entry"),
        (BOOKWORM, {"source": "snap"}, "found 'snap'"),
        (system("openSUSE", "15", pkg_mgr="zypper"), {}, "no package plan"),
    ],
)
def test_what_has_no_plan(host: repository.System, options: dict[str, Any], told: str) -> None:
    with pytest.raises(PlanError, match=told):
        engine.plan(host, **options)


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("5:27.3.1-1~ubuntu.24.04~noble", (27, 3, 1)),
        ("20.10.24+dfsg1", (20, 10, 24)),
        ("v28.0", (28, 0)),
        ("6.8.0-45-generic", (6, 8, 0)),
        ("(none)", ()),
    ],
)
def test_upstream_version(version: str, numbers: tuple[int, ...]) -> None:
    assert engine.upstream(version) == numbers


def test_a_key_that_the_unit_gives_as_a_flag() -> None:
    flags = [
        "-H",
        "fd://",
        "--containerd=/run/containerd/containerd.sock",
        "--add-runtime=nvidia=/usr/bin/x",
        "--live-restore",
    ]
    settings = {"runtimes": {}, "live-restore": True, "features": {}, "log-level": "warn"}
    assert engine.flag_conflicts(flags, settings) == ["live-restore", "runtimes"]
    assert engine.flag_conflicts(["-H", "fd://"], {"hosts": []}) == ["hosts"]
    assert engine.flag_conflicts([], settings) == []


def test_what_apt_would_install() -> None:
    assert (
        engine.candidate("docker.io:\n  Installed: (none)\n  Candidate: 28.2.2-0ubuntu1\n  Version table:\n")
        == "28.2.2-0ubuntu1"
    )
    assert engine.candidate("docker.io:\n  Installed: (none)\n  Candidate: (none)\n") == ""
    assert engine.candidate("") == ""


def test_a_promise_of_nothing() -> None:
    assert engine.expected(BOOKWORM, candidate="20.10.24+dfsg1") == "20.10.24+dfsg1"
    assert engine.expected(system("Rocky", "9.6")) == ""
