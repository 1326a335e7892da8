"""The frontend and the workers of a deployment as the dicts that the Ansible role `service` runs.

One function a service. Each takes its entry of the topology and what it depends on, and nothing else: whatever is not
an argument cannot make its container be recreated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdstack.deploy.topology import CONFIG_MOUNT, Frontend, Topology, Worker, container_name

# Idle cost: every check starts a process in a container, and all containers together may use a tenth of a core.
CHECK = {"interval": "15s", "timeout": "5s", "retries": 3, "start_period": "120s"}
KEY_FILE = "cluster.key"
AUDIT_FILE = "kv-audit.jsonl"
FRONTEND_CHECK = "frontend_check.py"
# What runs a check in the worker image; -S -E start python3 in a few milliseconds.
PROBE = ["CMD", "python3", "-S", "-E", "/opt/pdstack/app/pdstack/probe.py"]
# Beyond the worker's own drain: it leaves etcd and NATS after that.
STOP_GRACE_S = 10
SCRATCH = "/tmp"  # noqa: S108  # a memory mount of the container's own

Spec = dict[str, Any]


def http_check(url: str) -> dict[str, Any]:
    """Return a health check that wants HTTP 200 from `url`, for containers of the worker image."""
    return {"test": [*PROBE, "http", url], **CHECK}


def frontend(
    entry: Frontend,
    topology: Topology,
    *,
    image: str,
    version: str,
    namespace: str,
    model_name: str,
    model_dir: str,
    router_mode: str,
    block_size: int,
) -> Spec:
    """Return the frontend. The model's directory must lie at the path that the workers register.

    It is healthy while it lists the model, in whatever image it runs: see `pdstack.deploy.frontend_check`.
    """
    command = [
        "dynamo.frontend",
        "--http-host", entry["address"],
        "--http-port", str(entry["port"]),
        "--namespace", namespace,
        "--router-mode", router_mode,
        # Without it a failed prefill is computed by decode, and nobody learns that disaggregation is gone.
        "--enforce-disagg",
    ]  # fmt: skip
    if router_mode == "kv":
        command += ["--kv-cache-block-size", str(block_size)]
    return {
        "name": "frontend",
        "image": image,
        "command": command,
        "env": {
            "ETCD_ENDPOINTS": ",".join(topology["etcd_endpoints"]),
            "NATS_SERVER": entry["nats_server"],
            "DYN_LOG": "info",
            "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
            "HOME": SCRATCH,
        },
        "volumes": [f"{model_dir}:{model_dir}:ro"],
        "tmpfs": [SCRATCH],
        "files": [{"path": FRONTEND_CHECK, "content": (Path(__file__).parent / FRONTEND_CHECK).read_text()}],
        "healthcheck": {
            "test": [
                *("CMD", "python3", "-S", "-E", f"{CONFIG_MOUNT}/{FRONTEND_CHECK}", entry["url"], model_name),
                *(namespace, *topology["etcd_endpoints"]),
            ],
            **CHECK,
        },
        # An idle frontend takes 5 s to leave, a busy one finishes its streams.
        "stop_timeout": 30,
        "labels": {"pdstack.version": version},
    }


def worker_config(
    worker: Worker,
    topology: Topology,
    *,
    namespace: str,
    model_name: str,
    model_dir: str,
    engine: Mapping[str, Any],
    transfer: Mapping[str, Any],
    drain_timeout_s: float,
    migration_limit: int,
    data_dir: str,
    order: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
) -> dict[str, Any]:
    """Return worker.json (see `pdstack.worker.config`); `engine` is overlaid by what the worker's entry sets.

    `data_dir` is the deployment's; the worker's own directory below it takes its audit records. `order` holds for each
    decode worker the order of the paths to the prefill workers where it is not the usual one (`kv_path.orders`).
    """
    moves: dict[str, Any] = {"stream_port": worker["stream_port"]} if worker["role"] == "prefill" else {}
    prefill = [other["name"] for other in topology["workers"] if other["role"] == "prefill"]
    known = (order or {}).get(worker["name"], {}) if transfer.get("path") == "auto" else {}
    if peers := {name: list(known[name]) for name in prefill if name in known}:
        moves["order"] = peers
    return {
        "name": worker["name"],
        "role": worker["role"],
        "namespace": namespace,
        "model_name": model_name,
        "model_path": model_dir,
        "etcd_endpoints": list(topology["etcd_endpoints"]),
        "nats_server": worker["nats_server"],
        "status": {"host": worker["address"], "port": worker["status_port"]},
        "engine": {**engine, **worker["engine"]},
        "transfer": {
            **transfer,
            "cluster_key_file": f"{CONFIG_MOUNT}/{KEY_FILE}",
            "listen": {"host": worker["address"], "port": worker["transfer_port"]},
            "advertise": worker["address"],
            "audit_file": f"{data_dir}/{worker['name']}/{AUDIT_FILE}",
            **moves,
        },
        "drain_timeout_s": float(drain_timeout_s),
        "migration_limit": migration_limit,
    }


def worker(
    entry: Worker,
    config: Mapping[str, Any],
    *,
    image: str,
    version: str,
    fabric: Mapping[str, Any],
    cluster_key: str,
) -> Spec:
    """Return a prefill or decode worker; `config` is `worker_config`, `fabric` a profile of `kv_fabrics`."""
    model_dir = config["model_path"]
    threads = str(config["engine"]["threads"])
    return {
        "name": entry["name"],
        "image": image,
        "command": ["pdstack.worker", "--config", f"{CONFIG_MOUNT}/worker.json"],
        "env": {
            "OPENBLAS_NUM_THREADS": threads,
            "DYN_LOG": "info",
            "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
            "HOME": SCRATCH,
            **fabric["env"],
            **entry["env"],
        },
        "volumes": [f"{model_dir}:{model_dir}:ro"],
        # Its audit records outlive the container; nothing else is written there.
        "data_dirs": ["."],
        "tmpfs": [SCRATCH],
        "capabilities": list(fabric["capabilities"]),
        "ulimits": list(fabric["ulimits"]),
        "pid_mode": fabric["pid_mode"],
        "ipc_mode": fabric["ipc_mode"],
        "files": [
            {"path": "worker.json", "content": json.dumps(config, indent=2, sort_keys=True) + "\n"},
            {"path": KEY_FILE, "content": cluster_key, "mode": "0400", "secret": True},
        ],
        "healthcheck": http_check(f"{entry['status_url']}/health"),
        "stop_timeout": int(config["drain_timeout_s"]) + STOP_GRACE_S,
        "labels": {"pdstack.version": version, "pdstack.role": entry["role"]},
    }


def names(topology: Topology, host: str) -> Sequence[str]:
    """Return the containers that `host` runs."""
    entries: list[Mapping[str, Any]] = [
        *topology["etcd"], *topology["nats"], *topology["frontends"], *topology["workers"],
    ]  # fmt: skip
    return [entry["container"] for entry in entries if entry["host"] == host]


def stale(containers: Sequence[str], topology: Topology, host: str) -> list[str]:
    """Return the services among `containers` (names, all of this deployment) that `host` should not run, sorted."""
    prefix = container_name(topology["name"], "")
    wanted = set(names(topology, host))
    return sorted(name.removeprefix(prefix) for name in containers if name.startswith(prefix) and name not in wanted)


def removal_order(containers: Sequence[str], deployment: str) -> list[str]:
    """Return the services of a deployment's containers, in the order of removal: what others depend on goes last."""
    last = {"frontend": 1, "nats": 2, "etcd": 3}
    prefix = container_name(deployment, "")
    found = [name.removeprefix(prefix) for name in containers if name.startswith(prefix)]
    return sorted(found, key=lambda service: (last.get(service, 0), service))
