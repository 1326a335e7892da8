from __future__ import annotations

import re
import stat

import pytest
from testinfra.host import Host


def test_the_cluster_key_is_secret_on_the_controller(pytestconfig: pytest.Config) -> None:
    key = pytestconfig.rootpath / ".pdstack/molecule/cluster.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert re.fullmatch(r"[0-9a-f]{64}\n?", key.read_text())


def test_processes_of_the_host_may_read_each_other_s_memory(host: Host) -> None:
    """What the fabric profile same_host rests on."""
    scope = host.file("/proc/sys/kernel/yama/ptrace_scope")
    assert not scope.exists or int(scope.content_string) <= 1
