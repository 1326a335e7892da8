"""The services of a deployment as the dicts that the Ansible role `service` runs.

One function a service. Each takes its entry of the topology and what it depends on, and nothing else: whatever is not
an argument cannot make its container be recreated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pdstack.deploy.topology import CONFIG_MOUNT, Etcd, Frontend, Nats, Topology, Worker, bracketed, container_name

# Idle cost: every check starts a process in a container, and all containers together may use a tenth of a core.
CHECK = {"interval": "15s", "timeout": "5s", "retries": 3, "start_period": "120s"}
KEY_FILE = "cluster.key"
# What runs a check in the worker image; -S -E start python3 in a few milliseconds.
PROBE = ["CMD", "python3", "-S", "-E", "/opt/pdstack/app/pdstack/probe.py"]
# Beyond the worker's own drain: it leaves etcd and NATS after that.
STOP_GRACE_S = 10
SCRATCH = "/tmp"  # noqa: S108  # a memory mount of the container's own

Spec = dict[str, Any]


def bash_http_check(address: str, port: int, path: str) -> dict[str, Any]:
    """Return a health check that wants HTTP 200, by bash alone: the etcd and NATS images hold nothing else for it."""
    script = (
        f"exec 3<>/dev/tcp/{address}/{port} && printf 'GET {path} HTTP/1.0\\r\\nHost: {address}\\r\\n\\r\\n' >&3 "
        "&& read -r -t 4 status <&3 && [[ $status == *' 200 '* ]]"
    )
    return {"test": ["CMD", "bash", "-c", script], **CHECK}


def http_check(url: str) -> dict[str, Any]:
    """Return a health check that wants HTTP 200 from `url`, for containers of the worker image."""
    return {"test": [*PROBE, "http", url], **CHECK}


def etcd(member: Etcd, topology: Topology, *, image: str, version: str, data_dir: str, quota_mib: int) -> Spec:
    """Return the etcd member; `data_dir` is its directory on the host and in the container."""
    return {
        "name": "etcd",
        "image": image,
        "command": [
            "--name", member["member"],
            "--data-dir", data_dir,
            "--listen-client-urls", member["client_url"],
            "--advertise-client-urls", member["client_url"],
            "--listen-peer-urls", member["peer_url"],
            "--initial-advertise-peer-urls", member["peer_url"],
            "--initial-cluster", topology["etcd_initial_cluster"],
            "--initial-cluster-state", "new",
            "--initial-cluster-token", f"pdstack-{topology['name']}",
            # Leases and keep-alives make revisions for ever; an hour of history is plenty for watches.
            "--auto-compaction-mode", "periodic",
            "--auto-compaction-retention", "1h",
            "--quota-backend-bytes", str(quota_mib * 1024 * 1024),
            "--enable-v2=false",
            "--logger", "zap",
            "--log-level", "warn",
        ],
        "data_dirs": ["."],
        "healthcheck": bash_http_check(member["address"], member["client_port"], "/health"),
        "labels": {"pdstack.version": version},
    }  # fmt: skip


def nats_config(server: Nats, topology: Topology, *, store_dir: str, store_mib: int, payload_mib: int) -> str:
    """Return nats.conf; JetStream stores in `store_dir`, at most `store_mib` MiB."""
    settings = {
        "server_name": f"pdstack-{topology['name']}-{server['host']}",
        "listen": f"{bracketed(server['address'])}:{server['client_port']}",
        "http": f"{bracketed(server['address'])}:{server['monitor_port']}",
        # Prompts travel as JSON lists of token ids: NATS's own limit of 1 MiB is met at about 150,000 tokens.
        "max_payload": payload_mib * 1024 * 1024,
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items()]
    return "\n".join(
        [
            *lines,
            "jetstream {",
            f"  store_dir: {json.dumps(store_dir)}",
            f"  max_file_store: {store_mib * 1024 * 1024}",
            f"  max_memory_store: {64 * 1024 * 1024}",
            "}",
            "",
        ]
    )


def nats(server: Nats, *, image: str, version: str, config: str) -> Spec:
    """Return the NATS server; `config` is the text of nats.conf."""
    return {
        "name": "nats",
        "image": image,
        "command": ["--config", f"{CONFIG_MOUNT}/nats.conf"],
        "files": [{"path": "nats.conf", "content": config}],
        "data_dirs": ["."],
        "healthcheck": bash_http_check(server["address"], server["monitor_port"], "/healthz?js-enabled=true"),
        "labels": {"pdstack.version": version},
    }


def frontend(
    entry: Frontend,
    topology: Topology,
    *,
    image: str,
    version: str,
    namespace: str,
    model_dir: str,
    router_mode: str,
    block_size: int,
) -> Spec:
    """Return the frontend. The model's directory must lie at the path that the workers register."""
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
            "NATS_SERVER": topology["nats_server"],
            "DYN_LOG": "info",
            "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
            "HOME": SCRATCH,
        },
        "volumes": [f"{model_dir}:{model_dir}:ro"],
        "tmpfs": [SCRATCH],
        "healthcheck": http_check(f"{entry['url']}/health"),
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
) -> dict[str, Any]:
    """Return worker.json (see `pdstack.worker.config`); `engine` is overlaid by what the worker's entry sets."""
    return {
        "name": worker["name"],
        "role": worker["role"],
        "namespace": namespace,
        "model_name": model_name,
        "model_path": model_dir,
        "etcd_endpoints": list(topology["etcd_endpoints"]),
        "nats_server": topology["nats_server"],
        "status": {"host": worker["address"], "port": worker["status_port"]},
        "engine": {**engine, **worker["engine"]},
        "transfer": {
            **transfer,
            "cluster_key_file": f"{CONFIG_MOUNT}/{KEY_FILE}",
            "listen": {"host": worker["address"], "port": worker["transfer_port"]},
            "advertise": worker["address"],
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
