"""Engine trtllm over the lab: Dynamo and its worker are real, the engine is a stand-in (tests/standins/lab_runtime).

What provisions GPU hosts (tag gpu) is left out: the hosts only look like provisioned ones; it has scenarios of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab import hosts
from tests.lab.cluster import ROOT, Cluster, Watch
from tests.standins.fakehost import make

from pdstack.deploy import ask, proof

STANDINS = "/opt/pdstack-fake"
RUNTIME = "/usr/local/bin/nvidia-container-runtime"
# Docker's way to GPUs: a runtime that stands before runc. This one writes down that it was called.
SCRIPT = f"""\
mkdir -p /etc/docker
printf '#!/bin/sh\\necho "$*" >> /var/log/nvidia-container-runtime.log\\nexec runc "$@"\\n' > {RUNTIME}
chmod 755 {RUNTIME}
echo '{{"runtimes": {{"nvidia": {{"path": "{RUNTIME}"}}}}}}' > /etc/docker/daemon.json
pkill -HUP -x dockerd
"""
WORKERS = {"lab-2/prefill-0", "lab-4/prefill-1", "lab-3/decode-0", "lab-4/decode-1"}


@pytest.fixture(scope="module")
def cluster(lab: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.standins.lab_runtime"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    image = done.stdout.split()[-1]
    hosts.hand_over([image], lab)
    work = tmp_path_factory.mktemp("gpu-hosts")
    model = next(iter(sorted((ROOT / ".cache/models").glob("tiny-*"))))
    for number, host in enumerate(lab, start=1):
        root = make(work / str(number) / "root", os="debian 12", interfaces={"eth0": (hosts.address(number), 1500)})
        hosts.docker("exec", host, "sh", "-c", f"rm -rf {STANDINS} /srv/models; mkdir -p {STANDINS} /srv/models")
        hosts.docker("cp", str(root), f"{host}:{STANDINS}")
        hosts.docker("cp", str(model), f"{host}:/srv/models/tiny")
        hosts.docker("exec", host, "sh", "-c", SCRIPT)
    found = Cluster("labgpu", ["inventories/lab", "tests/lab/trtllm.yml"])
    found.options += ["-e", f"trtllm_image={image}", "--skip-tags", "gpu"]
    yield found
    found.play("playbooks/lifecycle/destroy.yml")


@pytest.fixture(scope="module")
def deployed(cluster: Cluster) -> Cluster:
    if not (cluster.state_dir / "deployment.json").exists():
        cluster.deploy()
    return cluster


def answer(cluster: Cluster, frontend: int) -> str:
    url = cluster.topology["frontends"][frontend]["url"]
    found = ask.complete(url, "tiny", list(range(5, 90)), 8)
    assert found.good, found.problem()
    return found.text


def requests(cluster: Cluster) -> dict[str, float]:
    """Requests that each worker has handled."""
    counts = {}
    for worker in cluster.topology["workers"]:
        text = ask.get(f"{worker['status_url']}/metrics")[1]
        counts[f"{worker['host']}/{worker['name']}"] = proof.metric(text, "dynamo_component_requests_total")
    return counts


def test_deploy_passes_its_verification(cluster: Cluster) -> None:
    run = cluster.deploy()
    cluster.report["deploy_s"] = round(run.seconds)
    assert cluster.results()["passed"]


def test_containers_got_their_gpus_through_the_runtime(deployed: Cluster) -> None:
    inspected = deployed.inspect()
    assert set(inspected) >= WORKERS
    for name in WORKERS:
        assert inspected[name]["HostConfig"]["Runtime"] == "nvidia", name
    for number in (2, 3, 4):
        assert "create" in hosts.docker("exec", hosts.name(number), "cat", "/var/log/nvidia-container-runtime.log")


def test_requests_go_through_prefill_and_decode_on_separate_hosts(deployed: Cluster) -> None:
    before = requests(deployed)
    texts = {answer(deployed, frontend) for _ in range(2) for frontend in (0, 1)}
    after = requests(deployed)
    assert len(texts) == 1
    busy = {name for name in after if after[name] > before[name]}
    assert {"prefill", "decode"} <= {name.partition("/")[2].rpartition("-")[0] for name in busy}, busy
    assert len({name.partition("/")[0] for name in busy}) >= 2, busy


def test_a_second_deploy_changes_nothing(deployed: Cluster) -> None:
    before = deployed.started()
    assert deployed.deploy().changed == {}
    assert deployed.started() == before


def test_another_backend_restarts_the_workers_only_and_one_at_a_time(deployed: Cluster) -> None:
    urls = {
        f"{entry['host']}/{entry['name']}": f"{entry['status_url']}/health" for entry in deployed.topology["workers"]
    }
    before = deployed.started()
    with Watch(urls) as watch:
        deployed.deploy("-e", "kv_transfer_backend=nixl")
    after = deployed.started()
    assert {service for service in after if after[service] != before[service]} == WORKERS
    assert watch.ever == WORKERS
    assert len(watch.most) == 1, f"{sorted(watch.most)} were down at the same time"
    assert answer(deployed, 0)
    assert Path(deployed.state_dir / "verify.json").exists()
