"""GPU hosts with one defect each: `deploy` refuses them before any change, with a message that names the fix.

The hosts are trees of files (tests/standins/fakehost.py) that the probe reads in place of /, reached over a local
connection. One run has many hosts: a step that refuses says so for each host that it refuses, and ends the run for all.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.standins.fakehost import make

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "10.9.0.{}"
MTU = 9000
PORT_OFFSET = 30000
RECAP = re.compile(r"^(\S+)\s+: ok=\d+\s+changed=(\d+)", re.MULTILINE)


@dataclass
class Broken:
    """A host: what its tree is made of, its variables, and what the refusal says beside its name."""

    tree: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
    says: tuple[str, ...] = ()
    mtu: int = MTU


# What no step of a deployment mends: the doctor's checks of the stage `bare`.
DOCTOR = {
    "gpu-missing": Broken(
        {"gpus": 1}, says=("GPUs on the PCI bus", "2 (gpu_count)", "reseat"),
    ),
    "secure-boot": Broken(
        {"secure_boot": True, "loaded": None, "key_enrolled": False},
        says=("Secure Boot lets the driver in", "mokutil --import"),
    ),
    "unlisted-os": Broken({"os": "fedora 42"}, says=("operating system", "allow_unlisted_os")),
    "port-taken": Broken(
        {"listeners": [{"port": 9100 + PORT_OFFSET, "process": "vllm", "pid": 4711}]},
        says=("planned ports are free", "vllm (pid 4711)", "pdstack_port_offset"),
    ),
    "disk-short": Broken({"disk_mib": 20 * 1024}, says=("disk space", "/var/lib/docker 20480 MiB free")),
    "mtu-differs": Broken(says=("MTU equal on all hosts", "eth0 1500", "ip link set eth0 mtu 9000"), mtu=1500),
    "broken-daemon-json": Broken({"daemon_json": '{"runtimes": {'}, says=("daemon.json is sound", "broken: Expecting")),
    "run-file": Broken(
        {"run_file": True}, says=("the driver does not change by itself", "the driver of a .run file"),
    ),
}  # fmt: skip
# The same where KV is to go over InfiniBand.
RDMA: dict[str, Any] = {"nics": 1, "peermem": True}
FABRIC = {
    "no-nic": Broken({"nics": 0}, says=("the planned network devices exist", "mlx5_0:1")),
    "nic-down": Broken({"nic_state": "DOWN"}, says=("RDMA ports are up", "DOWN")),
}
# What the roles that prepare a GPU host refuse, though they mend much else.
ROLES = {
    "mismatch": Broken(
        {"library": "580.126.09"},
        says=("its library is 580.126.09", "a boot, which this run may not do", "deploy from another machine"),
    ),
    "nouveau": Broken(
        {"driver": None, "nouveau": True},
        says=("nouveau is loaded", "a boot, which this run may not do", "deploy from another machine"),
    ),
    "held": Broken(
        {"holds": ["nvidia-open"], "packages": {"nvidia-open": "570.172.08-1"}},
        says=("held packages", "apt-mark unhold nvidia-open"),
    ),
}  # fmt: skip


class Engine(http.server.BaseHTTPRequestHandler):
    """Answers /version as a container engine of years ago does."""

    def do_GET(self) -> None:
        body = json.dumps({"Version": "20.10.24", "ApiVersion": "1.41"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def old_engine(tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "docker.sock")
    with socketserver.ThreadingUnixStreamServer(path, Engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield path
        server.shutdown()


def inventory(folder: Path, hosts: Mapping[str, Broken], tree: Mapping[str, Any], **more: Any) -> Path:
    """GPU hosts with a prefill worker each, and one more that decodes; etcd, NATS and a frontend on the first.

    `tree` is what all hosts have, `more` are settings of the deployment.
    """
    every = {**hosts, "well": Broken()}
    variables = {}
    for number, (name, host) in enumerate(every.items(), start=1):
        make(folder / name, **{"interfaces": {"eth0": (ADDRESS.format(number), host.mtu)}, **tree, **host.tree})
        own = {"pdstack_address": ADDRESS.format(number), "pdstack_probe_root": str(folder / name)}
        variables[name] = own | host.variables
    settings = {
        "pdstack_name": "broken",
        "pdstack_port_offset": PORT_OFFSET,
        "ansible_connection": "local",
        "ansible_python_interpreter": "{{ ansible_playbook_python }}",
        # This machine's own engine, whatever it is, has nothing to do with those hosts.
        "container_engine__socket": str(folder / "none.sock"),
        "engine": "trtllm",
        "kv_fabric": "tcp",
        "kv_mtu": MTU,
        "gpu_count": 2,
        "model_source": "hub",
        "model_ref": "owner/any",
        "model_revision": "0123456789abcdef0123456789abcdef01234567",
        "model_name": "any",
        "prefill_workers": [{"gpus": [0, 1]}],
        "decode_workers": [{"gpus": [0, 1]}],
        **more,
    }
    one = {"hosts": {next(iter(every)): None}}
    groups = {"etcd": one, "nats": one, "frontend": one, "decode": {"hosts": {"well": None}}}
    groups["prefill"] = {"hosts": dict.fromkeys(hosts)}
    target = folder / "hosts.yml"
    target.write_text(yaml.safe_dump({"all": {"vars": settings, "hosts": variables, "children": groups}}))
    return target


def deploy(path: Path) -> tuple[int, str]:
    """Run what a deployment does before any change; return its status and what it said, with single spaces."""
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "inventories/common", "-i", str(path)]
    done = subprocess.run(
        [*command, "tests/lab/refuse.yml"], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
    )  # fmt: skip
    said = done.stdout + done.stderr
    recap = RECAP.findall(said)
    assert recap, said
    assert {host: changed for host, changed in recap if changed != "0"} == {}, said
    return done.returncode, said


def refusals(said: str) -> dict[str, str]:
    """What was said of each host that failed, with single spaces."""
    parts = re.split(r"^fatal: \[([^\]]+)\]", said.partition("PLAY RECAP")[0], flags=re.MULTILINE)
    return {host: re.sub(r"\s+", " ", text) for host, text in zip(parts[1::2], parts[2::2], strict=True)}


def check(folder: Path, hosts: Mapping[str, Broken], tree: Mapping[str, Any] | None = None, **more: Any) -> None:
    status, said = deploy(inventory(folder, hosts, tree or {}, **more))
    assert status != 0
    refused = refusals(said)
    assert set(refused) == set(hosts), said
    for name, host in hosts.items():
        assert [text for text in host.says if text not in refused[name]] == [], f"{name}: {refused[name]}"


def test_a_deployment_begins_with_what_is_tested_here() -> None:
    """Otherwise something is changed before a refusal."""
    steps = [
        entry["ansible.builtin.import_playbook"] for entry in yaml.safe_load((ROOT / "playbooks/site.yml").read_text())
    ]
    here = [
        entry["ansible.builtin.import_playbook"]
        for entry in yaml.safe_load((ROOT / "tests/lab/refuse.yml").read_text())
    ]
    assert steps[: len(here)] == [Path(entry).name for entry in here]


def test_hosts_in_order_are_not_refused(tmp_path: Path) -> None:
    status, said = deploy(inventory(tmp_path, {"as-well": Broken()}, RDMA, kv_fabric="ib", kv_net_devices=["mlx5_0:1"]))
    assert status == 0, said


def test_what_no_step_mends_is_refused(tmp_path: Path) -> None:
    check(tmp_path, DOCTOR)


def test_a_missing_network_is_refused(tmp_path: Path) -> None:
    check(tmp_path, FABRIC, RDMA, kv_fabric="ib", kv_net_devices=["mlx5_0:1"])


def test_what_the_roles_do_not_mend_is_refused(tmp_path: Path) -> None:
    check(tmp_path, ROLES)


def test_an_engine_of_years_ago_is_refused(tmp_path: Path, old_engine: str) -> None:
    says = ("container engine", "20.10.24", "23.0 or newer", "upgrade Docker")
    check(tmp_path, {"old-engine": Broken({"docker": "20.10.24"}, {"container_engine__socket": old_engine}, says)})
