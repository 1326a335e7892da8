from __future__ import annotations

import re

import pytest

from pdstack.deploy import tuning


def test_the_guard_is_a_blacklist_that_matches_what_breaks_a_gpu_host() -> None:
    text = tuning.apt_guard()
    patterns = re.findall(r'"([^"]+)";', text)
    assert text.count("Unattended-Upgrade::Package-Blacklist {") == 1
    guarded = "nvidia-open libnvidia-compute-580 libnvidia-container1 linux-image-6.8.0-45-generic docker-ce docker.io"
    for name in f"{guarded} containerd.io linux-modules-nvidia-580-server-open-generic".split():
        assert any(re.match(pattern, name) for pattern in patterns), name
    assert not any(re.match(pattern, "openssl") for pattern in patterns)


def test_neighbouring_ports_are_a_range() -> None:
    assert tuning.ranges([9200, 9101, 9100, 9102, 9100]) == "9100-9102,9200"
    assert tuning.ranges([]) == ""


@pytest.mark.parametrize(
    ("planned", "local", "present", "wanted"),
    [
        ([8000, 42000, 42001], "32768\t60999", "", "42000-42001"),
        ([8000], "1024 60999", "", "8000"),
        ([42000], "32768 60999", "5000,42001-42002", "5000,42000-42002"),
        ([8000], "", "", ""),
    ],
)
def test_reserved_are_the_planned_ports_inside_of_the_local_range(
    planned: list[int], local: str, present: str, wanted: str
) -> None:
    assert tuning.reserved_ports(planned, local, present) == wanted


def test_the_file_leaves_empty_values_out() -> None:
    assert tuning.sysctl_file({"vm.swappiness": 10, "net.ipv4.ip_local_reserved_ports": "", "a.b": "1 2"}) == (
        "# Written by pdstack.\na.b = 1 2\nvm.swappiness = 10\n"
    )


def test_pending_is_what_the_kernel_has_otherwise() -> None:
    wanted = {"vm.swappiness": 10, "kernel.numa_balancing": 0, "net.ipv4.tcp_rmem": "4096 1 2", "vm.max_map_count": ""}
    found = {"vm.swappiness": "60", "kernel.numa_balancing": None, "net.ipv4.tcp_rmem": "4096\t1\t2"}
    assert tuning.pending(wanted, found) == {"vm.swappiness": "10"}


def test_limits_let_containers_lock_memory() -> None:
    assert "LimitMEMLOCK=infinity\n" in tuning.limits_dropin(1048576)
    assert "LimitNOFILE=1048576\n" in tuning.limits_dropin(1048576)


def test_values_are_those_of_the_files_that_are_there() -> None:
    results = [{"item": "a.b", "rc": 0, "stdout": "1\t2\n"}, {"item": "c", "rc": 1, "stdout": ""}]
    assert tuning.values(results, "item") == {"a.b": "1\t2", "c": None}


def test_dnf_leaves_driver_and_kernel_alone() -> None:
    assert {"*nvidia*", "kernel*"} <= set(tuning.dnf_excludes().split())
