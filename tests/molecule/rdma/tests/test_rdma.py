from __future__ import annotations

import json

import pytest
from testinfra.host import Host

MODULES = ("mlx5_ib", "ib_uverbs", "rdma_ucm", "ib_umad")


@pytest.mark.parametrize("name", ["rdma-core", "ibverbs-providers", "ibverbs-utils", "infiniband-diags", "perftest"])
def test_the_distribution_s_stack_is_there(host: Host, name: str) -> None:
    assert host.package(name).is_installed


def test_the_real_tools_run_as_far_as_this_kernel_lets_them(host: Host) -> None:
    done = host.run("ibv_devinfo")
    assert done.rc == 255
    assert "Failed to get IB devices list" in done.stderr


def test_the_modules_are_loaded_now_and_at_boot(host: Host) -> None:
    lines = host.file("/etc/modules-load.d/pdstack-rdma.conf").content_string.splitlines()
    assert tuple(line for line in lines if not line.startswith("#")) == MODULES
    for name in MODULES:
        assert host.file(f"/opt/pdstack-fake/root/sys/module/{name}").is_directory


def test_each_was_asked_for_once(host: Host) -> None:
    calls = [json.loads(line) for line in host.file("/opt/pdstack-fake/argv.log").content_string.splitlines()]
    asked = [call["argv"] for call in calls if call["program"] == "modprobe"]
    for name in MODULES:
        assert asked.count([name]) == 1


def test_logins_may_lock_memory(host: Host) -> None:
    assert "* hard memlock unlimited" in host.file("/etc/security/limits.d/95-pdstack-rdma.conf").content_string
