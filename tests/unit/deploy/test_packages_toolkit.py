from __future__ import annotations

from typing import Any

import pytest

from pdstack.deploy.packages import repository, toolkit
from pdstack.deploy.packages.repository import PlanError

SYSTEMS: dict[str, dict[str, Any]] = {
    "ubuntu-22.04": {"distribution": "Ubuntu", "distribution_version": "22.04", "distribution_release": "jammy"},
    "ubuntu-24.04": {"distribution": "Ubuntu", "distribution_version": "24.04", "distribution_release": "noble"},
    "debian-12": {"distribution": "Debian", "distribution_version": "12.11", "distribution_release": "bookworm"},
    "rocky-9": {"distribution": "Rocky", "distribution_version": "9.6", "distribution_release": "Blue Onyx"},
    "rhel-9": {"distribution": "RedHat", "distribution_version": "9.4", "distribution_release": "Plow"},
}
REPOSITORIES = {
    "toolkit": {
        "deb": {"uri": "https://packages.example/deb/{arch}", "suite": "/", "key": "https://packages.example/key"},
        "rpm": {
            "baseurl": "https://packages.example/rpm/{machine}",
            "gpgkey": "https://packages.example/key",
            "gpgcheck": False,
            "repo_gpgcheck": True,
        },
    }
}


def system(name: str, **changed: Any) -> repository.System:
    manager = "dnf" if name.startswith("r") else "apt"
    known = {"architecture": "x86_64", "kernel": "6.8.0-1-generic", "pkg_mgr": manager}
    return repository.system(SYSTEMS[name] | known | changed)


@pytest.mark.parametrize("name", ["ubuntu-22.04", "ubuntu-24.04", "debian-12"])
def test_on_debian_and_ubuntu(name: str) -> None:
    plan = toolkit.plan(system(name), "1.20.0-1", REPOSITORIES)
    assert plan["packages"] == [
        "nvidia-container-toolkit=1.20.0-1",
        "nvidia-container-toolkit-base=1.20.0-1",
        "libnvidia-container-tools=1.20.0-1",
        "libnvidia-container1=1.20.0-1",
    ]
    assert plan["repository"]["file"] == {
        "path": "/etc/apt/sources.list.d/nvidia-container-toolkit.sources",
        "content": "# Written by pdstack.\nTypes: deb\nURIs: https://packages.example/deb/amd64\nSuites: /\n"
        "Architectures: amd64\nSigned-By: /etc/apt/keyrings/nvidia-container-toolkit.asc\n",
    }
    assert plan["repository"]["key"]["url"] == "https://packages.example/key"
    assert plan["pins"]["content"] == (
        "Package: nvidia-container-toolkit nvidia-container-toolkit-base libnvidia-container-tools "
        "libnvidia-container1\nPin: version 1.20.0-1\nPin-Priority: 1001\n"
    )


@pytest.mark.parametrize("name", ["rocky-9", "rhel-9"])
def test_on_rhel_and_its_rebuilds(name: str) -> None:
    plan = toolkit.plan(system(name, architecture="aarch64"), "1.20.0-1", REPOSITORIES)
    assert plan["packages"][0] == "nvidia-container-toolkit-1.20.0-1"
    assert len(plan["packages"]) == 4
    assert plan["repository"]["file"] == {
        "path": "/etc/yum.repos.d/nvidia-container-toolkit.repo",
        "content": "# Written by pdstack.\n[nvidia-container-toolkit]\nname=nvidia-container-toolkit\n"
        "baseurl=https://packages.example/rpm/aarch64\nenabled=1\ngpgcheck=0\nrepo_gpgcheck=1\n"
        "gpgkey=https://packages.example/key\n",
    }
    assert plan["pins"]["path"] == ""


def test_the_refresh_service_came_with_1_18() -> None:
    assert toolkit.plan(system("debian-12"), "1.18.0-1", REPOSITORIES)["refreshes"]
    assert not toolkit.plan(system("debian-12"), "1.17.8-1", REPOSITORIES)["refreshes"]


@pytest.mark.parametrize(
    ("facts", "version", "repositories", "told"),
    [
        ({}, "1.20", REPOSITORIES, "wanted a package version such as"),
        ({}, "1.20.0-1", {}, "wanted its `deb` entry for debian 12.11"),
        ({}, "1.20.0-1", {"toolkit": {"deb": {"uri": "x/{release}"}}}, "found the word 'release'"),
        ({"distribution": "Fedora"}, "1.20.0-1", REPOSITORIES, "no package plan"),
    ],
)
def test_what_has_no_plan(facts: dict[str, Any], version: str, repositories: Any, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        toolkit.plan(system("debian-12", **facts), version, repositories)


def test_the_words_of_a_repository() -> None:
    text = "{id} {version} {major} {codename} {arch} {machine}"
    assert repository.fill(text, system("ubuntu-24.04")) == "ubuntu 24.04 24 noble amd64 x86_64"
    assert repository.fill(text, system("rocky-9")) == "rhel 9 9 Blue Onyx x86_64 x86_64"


OURS = "/etc/apt/sources.list.d/nvidia-container-toolkit.sources"


def test_earlier_sources_are_removed_and_a_strange_one_is_told() -> None:
    found = toolkit.sources(
        {
            OURS: "URIs: https://packages.example/libnvidia-container",
            "/etc/apt/sources.list.d/libnvidia-container.list": "deb https://x/libnvidia-container/stable/deb /",
            "/etc/apt/sources.list.d/nvidia-docker.list": "deb https://x/nvidia-docker/ubuntu18.04 /",
            "/etc/apt/sources.list": "deb https://deb.example bookworm main",
            "/etc/apt/sources.list.d/site.list": "# deb https://x/nvidia-docker\ndeb https://x/libnvidia-container /",
            "/etc/apt/sources.list.d/cuda.list": "# libnvidia-container\ndeb https://x/cuda /",
        },
        OURS,
    )
    assert found["remove"] == [
        "/etc/apt/sources.list.d/libnvidia-container.list",
        "/etc/apt/sources.list.d/nvidia-docker.list",
    ]
    (problem,) = found["problems"]
    assert "site.list" in problem.what
    assert problem.found == "deb https://x/libnvidia-container /"


@pytest.mark.parametrize(
    ("request_", "docker", "mode"),
    [
        ("auto", "20.10.24+dfsg1", "runtime"),
        ("auto", "25.0.0", "cdi"),
        ("auto", "28.2.2", "cdi"),
        ("auto", "", "runtime"),
        ("runtime", "28.2.2", "runtime"),
        ("cdi", "26.1.5+dfsg1", "cdi"),
    ],
)
def test_how_containers_get_gpus(request_: str, docker: str, mode: str) -> None:
    assert toolkit.gpu_mode(request_, docker, "25.0")["mode"] == mode


@pytest.mark.parametrize(("request_", "told"), [("cdi", "found Docker 24.0.7"), ("hook", "found 'hook'")])
def test_a_request_that_cannot_be_met(request_: str, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        toolkit.gpu_mode(request_, "24.0.7", "25.0")


def test_what_goes_into_daemon_json() -> None:
    runtime = {"runtimes": {"nvidia": {"path": "nvidia-container-runtime", "args": []}}}
    assert toolkit.daemon_settings("runtime") == runtime
    assert toolkit.daemon_settings("cdi") == runtime | {"features": {"cdi": True}}


LISTED = ["nvidia.com/gpu=0", "nvidia.com/gpu=1", "nvidia.com/gpu=GPU-1234", "nvidia.com/gpu=all"]


@pytest.mark.parametrize(
    ("spec", "listed", "driver", "gpus", "why"),
    [
        ("libcuda.so.580.105.08", LISTED, "580.105.08", 2, ""),
        ("libcuda.so.1", LISTED, "", 0, ""),
        ("", [], "580.105.08", 2, "nvidia.com/gpu=all is not listed"),
        ("libcuda.so.580.105.08", LISTED, "580.105.08", 8, "2 GPUs are listed, the driver has 8"),
        ("libcuda.so.575.51.03", LISTED, "580.105.08", 2, "it names libraries of driver 575.51.03"),
    ],
)
def test_when_the_cdi_specification_is_stale(spec: str, listed: list[str], driver: str, gpus: int, why: str) -> None:
    found = toolkit.cdi_stale(spec, listed, driver, gpus)
    assert found == why if not why else found.startswith(why)


def test_an_engine_that_keeps_containers_from_gpus() -> None:
    assert toolkit.security(["name=seccomp,profile=default", "name=cgroupns"], "") == []
    assert toolkit.security(["name=selinux"], "1 1\n") == []
    assert [problem.found for problem in toolkit.security(["name=rootless", "name=selinux"], "0 0\n")] == [
        "a rootless engine",
        "container_use_devices is off",
    ]
