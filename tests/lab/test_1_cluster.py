"""The reference engine over four hosts: deploy, change, restart member by member, lose a host, destroy. In order."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from tests.lab import hosts
from tests.lab.cluster import Cluster, Watch, answers, until

from pdstack.deploy import ask

HOSTS = ["lab-1", "lab-2", "lab-3", "lab-4"]
WORKERS = {"lab-2/prefill-0", "lab-4/prefill-1", "lab-3/decode-0", "lab-4/decode-1"}
SERVICES = {
    *(f"lab-{number}/{service}" for number in (1, 2, 3) for service in ("etcd", "nats")),
    *("lab-1/frontend", "lab-2/frontend", *WORKERS),
}
IN_A_ROW = 12


def health(cluster: Cluster, *kinds: str) -> dict[str, str]:
    """URL that answers 200 while a service is well, by `HOST/SERVICE`."""
    topology = cluster.topology
    urls = {}
    if "workers" in kinds:
        urls |= {f"{entry['host']}/{entry['name']}": f"{entry['status_url']}/health" for entry in topology["workers"]}
    if "etcd" in kinds:
        urls |= {f"{entry['host']}/etcd": f"{entry['client_url']}/health" for entry in topology["etcd"]}
    return urls


def leader(cluster: Cluster) -> str:
    """The host of the etcd member that leads."""
    members = cluster.topology["etcd"]
    for entry in members:
        text = ask.get(f"{entry['client_url']}/metrics")[1]
        if "\netcd_server_is_leader 1" in text:
            return entry["host"]
    raise AssertionError(f"none of {len(members)} etcd members leads")


def test_a_rehearsal_on_empty_hosts_changes_nothing(cluster: Cluster) -> None:
    run = cluster.deploy("--check", "--diff")
    assert cluster.inspect() == {}
    assert not (cluster.state_dir / "deployment.json").exists()
    cluster.report["rehearsal_s"] = round(run.seconds)


def test_deploy_brings_up_every_service_on_its_host(cluster: Cluster) -> None:
    run = cluster.deploy()
    cluster.report["deploy_s"] = round(run.seconds)
    assert set(cluster.inspect()) == SERVICES
    results = cluster.results()
    assert results["passed"]
    assert set(results["kv"]["transports"]) & {"tcp", "stream"}
    measured = json.loads((cluster.state_dir / "kv_path.json").read_text())["pairs"]
    workers = cluster.topology["workers"]
    roles = {role: {w["name"] for w in workers if w["role"] == role} for role in ("prefill", "decode")}
    assert {(pair["prefill"], pair["decode"]) for pair in measured} == set(product(roles["prefill"], roles["decode"]))
    assert all(not pair["problems"] for pair in measured)


def test_the_members_of_etcd_are_one_cluster(deployed: Cluster) -> None:
    members = deployed.topology["etcd"]
    leads = [ask.get(f"{entry['client_url']}/metrics")[1].count("\netcd_server_is_leader 1") for entry in members]
    assert sorted(leads) == [0, 0, 1]


def test_the_servers_of_nats_are_one_cluster(deployed: Cluster) -> None:
    for server in deployed.topology["nats"]:
        routes = json.loads(ask.get(f"{server['monitor_url']}/routez")[1])["num_routes"]
        assert routes >= 2, f"NATS of {server['host']} knows {routes} routes"


def test_every_frontend_answers_alike(deployed: Cluster) -> None:
    name = deployed.deployment["model"]["name"]
    texts = set()
    for entry in deployed.topology["frontends"]:
        answer = ask.complete(entry["url"], name, list(range(5, 90)), 16)
        assert answer.good, answer.problem()
        texts.add(answer.text)
    assert len(texts) == 1


def test_a_second_deploy_changes_and_restarts_nothing(deployed: Cluster) -> None:
    before = deployed.started()
    run = deployed.deploy()
    deployed.report["second_deploy_s"] = round(run.seconds)
    assert run.changed == {}
    assert deployed.started() == before


def test_another_backend_restarts_the_workers_only_and_one_at_a_time(deployed: Cluster) -> None:
    before = deployed.started()
    with Watch(health(deployed, "workers")) as watch:
        deployed.options[:] = ["-e", "kv_transfer_backend=nixl"]
        run = deployed.deploy()
    deployed.report["other_backend_s"] = round(run.seconds)
    after = deployed.started()
    assert {service for service in SERVICES if after[service] != before[service]} == WORKERS
    assert watch.ever == WORKERS
    assert len(watch.most) == 1, f"{sorted(watch.most)} were down at the same time"
    assert deployed.results()["kv"]["backend"] == "nixl"


def test_etcd_members_restart_one_by_one_leader_last_under_load(deployed: Cluster, load: Callable[..., Any]) -> None:
    before, led = deployed.started(), leader(deployed)
    with load(2) as running, Watch(health(deployed, "etcd")) as watch:
        assert running.wait(lambda so_far: so_far.counts()["ok"] >= 4, 60), running.counts()
        # Another command line, so every member has to be made anew.
        deployed.options += ["-e", "etcd__quota_mib=2049"]
        run = deployed.deploy("--tags", "coordination")
        # Dynamo 0.7 renews a lease of 10 s every 5 s and half a second after a lost connection: about one client in ten
        # loses it with its member, and starts again or registers again. Nobody may stay away.
        rolled = time.monotonic()
        back = running.wait(lambda so_far: so_far.recovered(rolled, IN_A_ROW) is not None, 60)
    counts = running.counts()
    deployed.report["rolling_etcd_answers"] = dict(counts)
    deployed.report["rolling_etcd_s"] = round(run.seconds)
    after = deployed.started()
    etcd = {f"lab-{number}/etcd" for number in (1, 2, 3)}
    # A frontend may have started again by itself.
    assert etcd <= {service for service in SERVICES if after[service] != before[service]}
    assert not any(after[worker] != before[worker] for worker in WORKERS)
    assert max(etcd, key=lambda service: after[service]) == f"{led}/etcd", "the leader was not the last"
    assert len(watch.most) == 1, f"{sorted(watch.most)} were down at the same time"
    assert counts["wrong"] == 0
    assert back, f"requests still fail: {counts}"
    for entry in deployed.topology["frontends"]:
        answer = ask.complete(entry["url"], deployed.deployment["model"]["name"], list(range(5, 90)), 16)
        assert answer.good, f"{entry['host']}: {answer.problem()}"


def test_the_loss_of_a_host_with_etcd_nats_and_a_frontend_stops_nobody(
    deployed: Cluster, load: Callable[..., Any]
) -> None:
    survivor = [entry["url"] for entry in deployed.topology["frontends"] if entry["host"] != "lab-1"]
    with load(2, survivor) as running:
        assert running.wait(lambda so_far: so_far.counts()["ok"] >= 4, 60), running.counts()
        lost = time.monotonic()
        hosts.docker("kill", "pdstack-lab-1")
        running.wait(lambda so_far: so_far.recovered(lost, IN_A_ROW) is not None, 90)
        # A lease is missed up to 10 s after its last keep-alive.
        running.wait(lambda _: False, 20)
        settled = time.monotonic()
        recovered = running.wait(lambda so_far: so_far.recovered(settled, IN_A_ROW) is not None, 60)
    counts = running.counts(since=lost)
    deployed.report["host_lost"] = dict(counts)
    assert counts["wrong"] == 0
    assert recovered, f"the others did not go on: {counts}"


def test_a_deploy_without_the_lost_host_is_refused_before_any_change(deployed: Cluster) -> None:
    run = deployed.play("site.yml", "-e", "pdstack_reach_timeout=5")
    assert run.status != 0
    assert "host lab-1: cannot be reached by Ansible. Nothing was changed on any host." in run.said
    assert run.changed == {}


def test_the_lost_host_comes_back_with_all_its_services(deployed: Cluster) -> None:
    hosts.docker("start", "pdstack-lab-1")
    topology = deployed.topology
    mine = [entry for kind in ("etcd", "nats", "frontends") for entry in topology[kind] if entry["host"] == "lab-1"]
    urls = [entry.get("client_url") or entry.get("monitor_url") or entry["url"] for entry in mine]
    paths = ["/health", "/healthz", "/health"]
    until("etcd, NATS and the frontend of lab-1 answer",
          lambda: all(answers(url + path) for url, path in zip(urls, paths, strict=True)), 120)  # fmt: skip
    run = deployed.deploy()
    assert run.changed == {}


@pytest.fixture(scope="module")
def destroyed(deployed: Cluster) -> Cluster:
    run = deployed.play("playbooks/lifecycle/destroy.yml")
    assert run.status == 0, run.output[-3000:]
    deployed.report["destroy_s"] = round(run.seconds)
    return deployed


@pytest.mark.parametrize("host", HOSTS)
def test_destroy_leaves_nothing_on_a_host(destroyed: Cluster, host: str) -> None:
    inside = ("exec", f"pdstack-{host}")
    assert hosts.docker(*inside, "docker", "ps", "--all", "--quiet") == ""
    assert hosts.docker(*inside, "docker", "volume", "ls", "--quiet") == ""
    left = hosts.docker(*inside, "find", "/etc/pdstack", "/var/lib/pdstack", "-mindepth", "1", check=False)
    assert [path for path in left.split() if not path.startswith("/var/lib/pdstack/models")] == []


def test_destroy_leaves_nothing_on_the_controller_and_is_no_error_twice(destroyed: Cluster) -> None:
    assert not destroyed.state_dir.exists()
    assert destroyed.play("playbooks/lifecycle/destroy.yml").changed == {}
