from __future__ import annotations

from testinfra.host import Host


def test_the_kernels_values_are_written(host: Host) -> None:
    text = host.file("/etc/sysctl.d/90-pdstack-gpu.conf").content_string
    assert "kernel.numa_balancing = 0\n" in text
    assert "vm.max_map_count = 262144\n" in text
    # What sets them at boot reads the file.
    assert "vm.max_map_count = 262144\n" in host.check_output("/lib/systemd/systemd-sysctl --cat-config")


def test_ports_in_the_range_of_outgoing_connections_are_reserved(host: Host) -> None:
    first, last = map(int, host.file("/proc/sys/net/ipv4/ip_local_port_range").content_string.split())
    text = host.file("/etc/sysctl.d/90-pdstack-gpu.conf").content_string
    # tests/molecule/vars.yml: every port is moved by 5000, so none of the deployment's is in Linux' default range.
    assert (first, last) == (32768, 60999)
    assert "ip_local_reserved_ports" not in text


def test_systemd_takes_the_limits(host: Host) -> None:
    text = host.file("/etc/systemd/system/docker.service.d/10-pdstack-limits.conf").content_string
    assert "LimitMEMLOCK=infinity\n" in text
    if host.service("docker").exists:
        shown = host.check_output("systemctl show docker --property LimitMEMLOCK,LimitNOFILE")
        assert set(shown.split()) == {"LimitMEMLOCK=infinity", "LimitNOFILE=1048576"}


def test_apt_reads_the_guard(host: Host) -> None:
    lines = host.check_output("apt-config dump Unattended-Upgrade::Package-Blacklist")
    assert '"^libnvidia-";' in lines
    assert '"^linux-(image|headers|generic)";' in lines
