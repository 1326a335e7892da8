from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from pdstack.deploy import coordination, service, services, topology
from pdstack.worker import config as worker_config


@pytest.fixture
def built(inventory: Any) -> topology.Topology:
    return topology.build(inventory.groups(), inventory.hosts(), inventory.settings(pdstack_name="t"))


def spec_of(name: str, built: topology.Topology, inventory: Any, **changed: Any) -> services.Spec:
    common = inventory.common
    if name == "etcd":
        known = {"image": "i:1", "version": "3", "data_dir": "/d", "quota_mib": 2048} | changed
        return coordination.etcd(built["etcd"][0], built, **known)
    if name == "nats":
        text = coordination.nats_config(built["nats"][0], built, store_dir="/s", store_mib=10, payload_mib=1)
        return coordination.nats(built["nats"][0], image="i:1", version="2", config=text)
    if name == "frontend":
        known = {
            "namespace": "t",
            "model_name": "m",
            "model_dir": "/m",
            "router_mode": "random",
            "block_size": 16,
        } | changed
        return services.frontend(built["frontends"][0], built, image="i:1", version="0.7", **known)
    worker = next(worker for worker in built["workers"] if worker["name"] == name)
    made = config_of(worker, built, inventory, **changed)
    return services.worker(
        worker, made, image="i:1", version="0.7", fabric=common["kv_fabrics"]["same_host"], cluster_key="secret"
    )


def config_of(worker: topology.Worker, built: topology.Topology, inventory: Any, **changed: Any) -> dict[str, Any]:
    known = {
        "namespace": "t", "model_name": "m", "model_dir": "/models/m", "engine": inventory.common["engine_defaults"],
        "transfer": {"backend": "ucx", **inventory.common["transfer_defaults"]},
        "drain_timeout_s": "30", "migration_limit": 3, "data_dir": "/d",
    } | changed  # fmt: skip
    return services.worker_config(worker, built, **known)


@pytest.mark.parametrize("name", ["etcd", "nats", "frontend", "prefill-0", "decode-0"])
def test_every_service_is_one_that_the_service_role_takes(name: str, built: topology.Topology, inventory: Any) -> None:
    spec = spec_of(name, built, inventory)
    assert service.errors(spec, "t") == []
    assert spec["healthcheck"]["test"][0] == "CMD"
    assert spec["labels"]["pdstack.version"]
    plan = service.plan(spec, deployment="t", config_dir="/etc/pdstack/t", data_dir="/var/lib/pdstack/t", uid=64000)
    assert plan["container"] in services.names(built, "a")


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_the_worker_reads_what_is_rendered(name: str, built: topology.Topology, inventory: Any, tmp_path: Any) -> None:
    spec = spec_of(name, built, inventory)
    path = tmp_path / "worker.json"
    path.write_text(spec["files"][0]["content"])
    config = worker_config.load(path)
    assert config.name == name
    assert config.transfer is not None
    assert config.transfer.cluster_key_file == "/etc/pdstack/cluster.key"
    assert config.drain_timeout_s == 30.0


def test_each_role_gets_what_concerns_it_of_the_paths(built: topology.Topology, inventory: Any) -> None:
    orders = {"decode-0": {"prefill-0": ["cma", "shared"], "prefill-9": ["stream"]}, "prefill-0": {"x": ["cma"]}}
    auto = {"backend": "ucx", "path": "auto"}
    prefill, decode = (
        next(worker for worker in built["workers"] if worker["role"] == role) for role in ("prefill", "decode")
    )
    made = config_of(decode, built, inventory, transfer=auto, order=orders)["transfer"]
    assert made["order"] == {"prefill-0": ["cma", "shared"]}, "one that is no longer there is left out"
    assert made["audit_file"] == "/d/decode-0/kv-audit.jsonl" and "stream_port" not in made
    fixed = config_of(decode, built, inventory, transfer=auto | {"path": "cma"}, order=orders)["transfer"]
    assert "order" not in fixed
    assert config_of(prefill, built, inventory, transfer=auto)["transfer"]["stream_port"] == 9300


def test_the_audit_file_lies_where_the_worker_may_write(built: topology.Topology, inventory: Any) -> None:
    spec = spec_of("prefill-0", built, inventory, data_dir="/var/lib/pdstack/t")
    plan = service.plan(spec, deployment="t", config_dir="/etc/pdstack/t", data_dir="/var/lib/pdstack/t", uid=64000)
    file = json.loads(spec["files"][0]["content"])["transfer"]["audit_file"]
    assert file == f"{plan['data_dirs'][0]}/kv-audit.jsonl"
    assert f"{plan['data_dirs'][0]}:{plan['data_dirs'][0]}:rw" in plan["volumes"]


def test_an_entry_of_the_inventory_overrides_engine_and_environment(inventory: Any) -> None:
    hosts = inventory.hosts(decode_workers=[{"engine": {"threads": 1}, "env": {"UCX_TLS": "tcp"}}])
    built = topology.build(inventory.groups(), hosts, inventory.settings(pdstack_name="t"))
    spec = spec_of("decode-0", built, inventory)
    assert json.loads(spec["files"][0]["content"])["engine"]["threads"] == 1
    assert spec["env"]["OPENBLAS_NUM_THREADS"] == "1"
    assert spec["env"]["UCX_TLS"] == "tcp"


def test_the_router_mode_concerns_the_frontend_alone(built: topology.Topology, inventory: Any) -> None:
    assert "--kv-cache-block-size" not in spec_of("frontend", built, inventory)["command"]
    assert "--kv-cache-block-size" in spec_of("frontend", built, inventory, router_mode="kv")["command"]
    assert "--enforce-disagg" in spec_of("frontend", built, inventory)["command"]
    assert "router" not in json.dumps(spec_of("decode-0", built, inventory))


def test_only_the_key_is_secret(built: topology.Topology, inventory: Any) -> None:
    files = spec_of("prefill-0", built, inventory)["files"]
    assert [(file["path"], file.get("secret", False)) for file in files] == [
        ("worker.json", False),
        ("cluster.key", True),
    ]
    assert "secret" not in files[0]["content"]


def test_stale_and_removal_order(built: topology.Topology) -> None:
    running = [
        "pdstack-t-etcd",
        "pdstack-t-decode-0",
        "pdstack-t-decode-7",
        "pdstack-t-frontend",
        "pdstack-t-nats",
        "other",
    ]
    assert services.stale(running, built, "a") == ["decode-7"]
    assert services.removal_order(running, "t") == ["decode-0", "decode-7", "frontend", "nats", "etcd"]


@pytest.fixture
def web() -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/good" else 503)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("path", "healthy"), [("/good", True), ("/bad", False)])
def test_bash_tells_200_from_503(web: int, path: str, healthy: bool) -> None:
    command = coordination.bash_http_check("127.0.0.1", web, path)["test"][1:]
    assert (subprocess.run(command, check=False, timeout=10).returncode == 0) is healthy


def test_bash_fails_when_nobody_listens() -> None:
    command = coordination.bash_http_check("127.0.0.1", 9, "/")["test"][1:]
    assert subprocess.run(command, check=False, timeout=10, capture_output=True).returncode != 0
