from __future__ import annotations

import json

import pytest
from testinfra.host import Host

PACKAGES = (
    "nvidia-container-toolkit",
    "nvidia-container-toolkit-base",
    "libnvidia-container-tools",
    "libnvidia-container1",
)


@pytest.mark.parametrize("name", PACKAGES)
def test_all_four_have_one_version_and_stay_there(host: Host, name: str) -> None:
    assert host.package(name).version == "1.20.0-1"
    assert "1001" in host.check_output(f"apt-cache policy {name}")


def test_one_source_is_left_and_apt_takes_it(host: Host) -> None:
    assert not host.file("/etc/apt/sources.list.d/libnvidia-container.list").exists
    assert not host.file("/etc/apt/sources.list.d/nvidia-container-toolkit.list").exists
    assert host.file("/etc/apt/sources.list.d/nvidia-container-toolkit.sources").exists
    assert "Signed-By" not in host.check_output("apt-get update 2>&1")


def test_nothing_was_held(host: Host) -> None:
    assert host.check_output("apt-mark showhold") == ""


def test_the_runtime_joined_what_others_had_set(host: Host) -> None:
    settings = json.loads(host.file("/etc/docker/daemon.json").content_string)
    # The scenario of container_engine leaves a person's log-level.
    settings.pop("log-level", None)
    assert settings == {
        "live-restore": True,
        "runtimes": {"nvidia": {"path": "nvidia-container-runtime", "args": []}},
    }


def test_the_engine_knows_the_runtime(host: Host) -> None:
    assert "nvidia" in json.loads(host.check_output("docker info --format '{{json .Runtimes}}'"))


def test_each_owner_remembers_what_is_its_own(host: Host) -> None:
    toolkit = json.loads(host.file("/var/lib/pdstack/nvidia-toolkit.json").content_string)
    engine = json.loads(host.file("/var/lib/pdstack/engine.json").content_string)
    assert list(toolkit["daemon_settings"]) == ["runtimes"]
    assert engine["daemon_settings"] == {"live-restore": True}
