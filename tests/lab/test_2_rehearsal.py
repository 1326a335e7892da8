"""`deploy -- -i inventories/cluster --check` over empty hosts goes through to the end in one pass, changing nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml
from tests.lab import hosts
from tests.lab.cluster import KEEP, ROOT, play
from tests.standins.fakehost import make

INVENTORIES = ["inventories/cluster", "tests/lab/cluster.yml"]
HOSTS = 7
GPU_HOSTS = (4, 5, 6, 7)
STANDINS = "/opt/pdstack-fake"


def files(host: str) -> str:
    """Names and sizes of what a deployment could have changed on a host."""
    places = (
        "/etc",
        "/opt",
        "/var/lib/pdstack",
        "/var/lib/dpkg/status",
        "/var/cache/pdstack",
        "/usr/local",
        "/lib/systemd",
    )
    return hosts.docker("exec", host, "find", *places, "-type", "f", "-printf", "%p %s\\n", check=False)


@pytest.fixture(scope="module")
def empty_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Hosts with nothing installed; four of them have eight GPUs and an InfiniBand adapter, for the probe."""
    if KEEP and len(hosts.running(hosts.BARE)) == HOSTS:
        yield hosts.running(hosts.BARE)
        return
    hosts.down(hosts.BARE)
    names = hosts.up(HOSTS, hosts.BARE)
    work = tmp_path_factory.mktemp("standins")
    subprocess.run([sys.executable, "-m", "tests.standins.aptrepo", "--out", str(work)], cwd=ROOT, check=True)
    for number in GPU_HOSTS:
        make(
            work / "root", os="debian 12", gpus=8, nvswitches=4, nics=1, driver=None, docker=None, toolkit=None,
            pin=False, interfaces={"eth0": (hosts.address(number, hosts.BARE), 1500)},
        )  # fmt: skip
        hosts.docker("cp", str(work), f"{hosts.name(number, hosts.BARE)}:{STANDINS}")
        shutil.rmtree(work / "root")
    yield names
    if not KEEP:
        hosts.down(hosts.BARE)


def test_a_rehearsal_of_the_cluster_goes_through_and_changes_nothing(empty_hosts: list[str]) -> None:
    before = {host: files(host) for host in empty_hosts}
    run = play("site.yml", INVENTORIES, "--check")
    assert run.status == 0, run.output[-5000:]
    print(f"rehearsal of inventories/cluster: {run.seconds:.0f} s")
    assert {host: files(host) for host in empty_hosts} == before
    assert not (ROOT / ".pdstack/cluster").exists()
    last = "NOT verified. A rehearsal (--check) runs no test"
    assert last in run.said, "the run ended before its last step"


def test_the_overlay_names_every_host_of_the_example() -> None:
    example, overlay = (
        yaml.safe_load((ROOT / path).read_text())["all"]["hosts"]
        for path in ("inventories/cluster/hosts.yml", "tests/lab/cluster.yml")
    )
    assert set(example) == set(overlay)
    assert len(overlay) == HOSTS
