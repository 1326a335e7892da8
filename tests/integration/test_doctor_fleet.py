"""The doctor over sixteen simulated hosts, by Ansible: each defect is told of the host that has it, and of no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.standins import fleet  # noqa: E402 - needs the path above

# Host -> what is wrong with it, and the checks that must say so.
DEFECTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "g00": ({}, set()),
    "g01": ({"driver": None}, {"driver_version", "nvidia_smi", "gpu_direct", "upgrades"}),
    "g02": ({"loaded": "580.95.05"}, {"driver_equal", "nvidia_smi"}),
    "g03": ({"nouveau": True, "loaded": None}, {"driver_version", "driver_equal", "nvidia_smi", "nouveau"}),
    "g04": ({"gpus": 1}, {"gpus_on_pci", "nvidia_smi"}),
    "g05": ({"daemon_json": "{"}, {"daemon_json"}),
    "g06": ({"nics": 1}, {"net_devices"}),
    "g07": ({"nic_state": "DOWN"}, {"rdma_ports"}),
    "g08": ({"interfaces": {"eth0": ("10.0.0.9", 1500)}}, {"mtu"}),
    "g09": ({"disk_mib": 1000}, {"disk"}),
    "g10": ({"os": "fedora 42"}, {"os"}),
    "g11": ({"toolkit": "1.16.1-1", "stale_cdi": True}, {"toolkit", "cdi"}),
    "g12": ({"nvswitches": 4, "fabric_manager": "580.95.05"}, {"fabric_manager"}),
    "g13": ({"peermem": True, "acs": 2}, {"gpu_direct", "acs"}),
    "g14": ({"variables": {"ansible_connection": "ssh", "ansible_port": 1}}, {"reachable"}),
    "g15": ({"variables": {"pdstack_python": "/nonexistent/python3"}}, {"reachable"}),
}  # fmt: skip


def doctor(inventory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the playbook as `nox -s doctor` does."""
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", "inventories/common", "-i", inventory,
         "playbooks/doctor.yml", *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the directory of the fleet and the report over it."""
    root = tmp_path_factory.mktemp("fleet")
    inventory = fleet.write(root, {name: what for name, (what, _) in DEFECTS.items()})
    before = listing(root / "hosts")
    done = doctor(inventory, "-e", f"doctor_file={root}/doctor.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert listing(root / "hosts") == before, "a host was changed"
    report: dict[str, Any] = json.loads((root / "doctor.json").read_text())
    return root, report


def listing(root: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in root.rglob("*"))


def failed(rows: list[Mapping[str, Any]]) -> set[str]:
    return {row["id"] for row in rows if row["verdict"] in ("fail", "warn")}


@pytest.mark.parametrize("host", DEFECTS)
def test_each_defect_is_told_of_its_host(site: tuple[Path, dict[str, Any]], host: str) -> None:
    _, report = site
    told = failed(report["hosts"][host])
    assert told == DEFECTS[host][1]
    for row in report["hosts"][host]:
        if row["verdict"] in ("fail", "warn"):
            assert row["found"] and row["wanted"] and row["fix"]


def test_the_status_reaches_the_caller(site: tuple[Path, dict[str, Any]]) -> None:
    root, report = site
    assert report["status"] == 2
    done = subprocess.run(
        [sys.executable, "-m", "pdstack.doctor.report", "--json", root / "doctor.json"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "FAIL  g03   7  nouveau is not loaded" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("16 hosts: ")


def test_good_hosts_give_status_0(tmp_path: Path) -> None:
    inventory = fleet.write(tmp_path, {"g0": {}, "g1": {"os": "rocky 9"}})
    done = doctor(inventory, "-e", f"doctor_file={tmp_path}/doctor.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "doctor.json").read_text())["status"] == 0
    done = doctor(inventory, "-e", f"doctor_file={tmp_path}/doctor.json", "--limit", "g1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads((tmp_path / "doctor.json").read_text())["hosts"]) == {"g1"}
    assert "1 host: " in done.stdout
