from __future__ import annotations

import json
from typing import Any

import pytest
from testinfra.host import Host

VERSION = "580.95.05"
LOG = "/opt/pdstack-fake/argv.log"


@pytest.fixture
def calls(host: Host) -> list[list[str]]:
    """What was called, in order, as [program, argument, ...]."""
    lines = host.file(LOG).content_string.splitlines()
    return [[entry["program"], *entry["argv"]] for entry in map(json.loads, lines)]


@pytest.fixture
def state(host: Host) -> Any:
    return json.loads(host.check_output("pdstack-fake show"))


def test_every_part_has_the_version_of_the_inventory(host: Host) -> None:
    listed = host.check_output("dpkg-query --show --showformat '${Package} ${Version} ${Status}\n' '*nvidia*' libcuda1")
    installed = dict(line.split()[:2] for line in listed.splitlines() if line.endswith(" installed"))
    assert {"nvidia-driver-cuda", "nvidia-kernel-open-dkms", "libcuda1", "libnvidia-ml1"} <= installed.keys()
    assert "nvidia-fabricmanager-580" in installed
    drivers = {name: version for name, version in installed.items() if name != "nvidia-dkms-helper"}
    assert set(drivers.values()) == {f"{VERSION}-1"}, "590 is in the repository, and nothing but the pin keeps it out"


def test_the_three_versions_are_one(state: Any) -> None:
    assert state["loaded"] == state["on_disk"] == state["library"] == VERSION


def test_what_was_done_in_which_order(calls: list[list[str]]) -> None:
    wanted = [
        ["update-initramfs", "-u", "-k", "all"],
        ["dkms", "install", f"nvidia/{VERSION}"],
        ["reboot"],
    ]
    assert [call for call in calls if call in wanted] == wanted


def test_nouveau_is_gone_and_stays_away(host: Host, state: Any) -> None:
    assert not host.file("/opt/pdstack-fake/root/sys/module/nouveau").exists
    assert state["initramfs_blacklist"] is True
    assert host.file("/etc/modprobe.d/pdstack-nouveau.conf").content_string.count("nouveau") == 2


def test_it_was_rebooted_once(state: Any) -> None:
    assert state["reboots"] == 1


def test_persistence_is_on_for_the_user_of_the_package(host: Host, state: Any) -> None:
    assert state["persistence"] is True
    command = host.check_output("systemctl show nvidia-persistenced --property ExecStart")
    assert "--user nvidia-persistenced --persistence-mode" in command
    assert host.service("nvidia-persistenced").is_enabled


def test_the_fabric_manager_runs(host: Host) -> None:
    assert host.service("nvidia-fabricmanager").is_running
    assert host.service("nvidia-fabricmanager").is_enabled


def test_containers_could_use_the_gpus(host: Host) -> None:
    assert host.check_output("nvidia-smi -L").count("GPU ") == 2


def test_the_keyring_came_as_its_package(host: Host) -> None:
    assert host.package("cuda-keyring").version == "1.1-1"


def test_the_next_branch_would_not_come_by_an_upgrade(host: Host) -> None:
    assert "nvidia" not in host.check_output("apt-get --simulate --quiet=2 dist-upgrade")
