from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.standins import fakehost

from pdstack.deploy import topology
from pdstack.doctor import fleet

ROOT = Path(__file__).resolve().parents[3]
GROUPS = {"etcd": ["h1"], "nats": ["h1"], "frontend": ["h1"], "prefill": ["h1"], "decode": ["h2"]}


def site(tmp_path: Path, **what: Any) -> tuple[Any, dict[str, Any], dict[str, dict[str, Any]]]:
    """Return topology, settings and variables of two fake GPU hosts; `what` is how h2 is."""
    common = yaml.safe_load((ROOT / "inventories/common/group_vars/all/main.yml").read_text())
    settings = {
        "pdstack_name": "s", "engine": "trtllm", "pdstack_ports": common["pdstack_ports"],
        # Away from the ports of what may run on this machine: nothing answers there.
        "pdstack_port_offset": 10000,
    }  # fmt: skip
    hosts = {
        name: {
            "pdstack_address": "127.0.0.1", "gpu_count": 2, "kv_interface": "eth0", "pdstack_python": sys.executable,
            "prefill_workers": [{"gpus": [0]}], "decode_workers": [{"gpus": [0]}],
            "pdstack_probe_root": str(fakehost.make(tmp_path / name, **(what if name == "h2" else {}))),
        }
        for name in ("h1", "h2")
    }  # fmt: skip
    return topology.build(GROUPS, hosts, settings), settings, hosts


def ask(tmp_path: Path, **what: Any) -> dict[str, list[dict[str, Any]]]:
    """Run each host's command in a shell, as Ansible does, and return the rows of the report."""
    made, settings, hosts = site(tmp_path, **what)
    for name, command in fleet.commands(made, list(hosts), settings, hosts).items():
        done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60)
        hosts[name]["pdstack_r_probe"] = {"stdout": done.stdout, "stderr": done.stderr, "rc": done.returncode}
    found: dict[str, list[dict[str, Any]]] = fleet.report(made, list(hosts), settings, hosts)["hosts"]
    return found


def failed(rows: list[dict[str, Any]]) -> set[str]:
    return {row["id"] for row in rows if row["verdict"] in ("fail", "warn")}


def test_each_host_is_asked_and_told_apart(tmp_path: Path) -> None:
    rows = ask(tmp_path, nouveau=True)
    assert failed(rows["h1"]) == set()
    assert failed(rows["h2"]) == {"nouveau"}


def test_what_must_be_equal_is_compared_between_hosts(tmp_path: Path) -> None:
    rows = ask(tmp_path, interfaces={"eth0": ("10.0.0.2", 1500)})
    assert failed(rows["h1"]) == {"mtu"}
    told = {name: next(row["found"] for row in rows[name] if row["id"] == "mtu") for name in rows}
    assert told == {"h1": "eth0 9000; h2 1500", "h2": "eth0 1500; h1 9000"}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"unreachable": True, "msg": "Failed to connect to the host via ssh"}, "Failed to connect"),
        ({"stdout": "", "stderr": "/bin/sh: 1: python3: not found", "rc": 127}, "python3: not found"),
        ({"stdout": "{broken"}, "gave no facts"),
        (None, "not asked"),
    ],
)
def test_a_host_that_gives_no_facts_is_a_failure_of_that_host(tmp_path: Path, said: Any, reason: str) -> None:
    made, settings, hosts = site(tmp_path)
    hosts["h2"]["pdstack_r_probe"] = said
    found = fleet.report(made, ["h2"], settings, hosts)
    assert found["status"] == 2
    [row] = found["hosts"]["h2"]
    assert (row["id"], row["verdict"]) == ("reachable", "fail")
    assert reason in row["found"]


def test_a_greeting_before_the_facts_does_not_matter() -> None:
    assert fleet.answer({"stdout": 'Welcome\n{"a": 1}\n'}) == ({"a": 1}, "")


def test_the_command_is_short_enough_for_a_shell(tmp_path: Path) -> None:
    made, settings, hosts = site(tmp_path)
    command = fleet.commands(made, ["h1"], settings, hosts)["h1"]
    # Linux takes one argument of 128 KiB; ssh, sudo and a shell quote it three times.
    assert len(shlex.quote(shlex.quote(shlex.quote(command)))) < 64 * 1024


def test_filters(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("doctor_filters", ROOT / "plugins/filter/pdstack_doctor.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    filters = module.FilterModule().filters()
    made, settings, hosts = site(tmp_path, nouveau=True)
    command = filters["pdstack_doctor_commands"](made, ["h2"], settings, hosts)["h2"]
    facts = json.loads(subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60).stdout)
    wanted = filters["pdstack_doctor_plan"](made, "h2", settings, hosts)
    rows = filters["pdstack_doctor"](facts, wanted, ids=["nouveau", "os"])
    assert [row["id"] for row in rows] == ["os", "nouveau"]
    assert "nouveau is not loaded (check 7)" in filters["pdstack_doctor_text"](rows, "h2")
    assert filters["pdstack_doctor_table"]({"h2": rows}).startswith("Host by host:\nFAIL  h2   7  nouveau")
    with pytest.raises(Exception, match="no such check"):
        filters["pdstack_doctor"](facts, wanted, ids=["nuveau"])
