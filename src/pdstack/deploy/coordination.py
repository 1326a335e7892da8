"""etcd and NATS as the dicts that the Ansible role `service` runs, and which image they run from.

Each function takes its entry of the topology and what it depends on, and nothing else: whatever is not an argument
cannot make its container be recreated.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from pdstack.deploy.services import CHECK, Spec
from pdstack.deploy.topology import CONFIG_MOUNT, Etcd, Nats, Topology, bracketed, container_name


def image_choice(setting: str, *, engine: str, releases: Iterable[str], pinned: str) -> str:
    """Return what etcd and NATS run from: `own` images, or the `runtime` image.

    `releases` are the distribution releases of the hosts that run them, `pinned` is the one whose packages
    versions.yml names: all members of a cluster are of one version, so one host without pins decides for all.
    """
    if setting != "auto":
        return setting
    return "runtime" if engine == "trtllm" and any(release != pinned for release in releases) else "own"


def bash_http_check(address: str, port: int, path: str) -> dict[str, Any]:
    """Return a health check that wants HTTP 200, by bash alone: the etcd and NATS images hold nothing else for it."""
    script = (
        f"exec 3<>/dev/tcp/{address}/{port} && printf 'GET {path} HTTP/1.0\\r\\nHost: {address}\\r\\n\\r\\n' >&3 "
        "&& read -r -t 4 status <&3 && [[ $status == *' 200 '* ]]"
    )
    return {"test": ["CMD", "bash", "-c", script], **CHECK}


def etcd(
    member: Etcd,
    topology: Topology,
    *,
    image: str,
    version: str,
    data_dir: str,
    quota_mib: int,
    entrypoint: Sequence[str] = (),
) -> Spec:
    """Return the etcd member; `data_dir` is its directory on the host and in the container.

    `entrypoint` is needed for an image that would start something else.
    """
    return {
        "name": "etcd",
        "image": image,
        **({"entrypoint": list(entrypoint)} if entrypoint else {}),
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
            "--logger", "zap",
            "--log-level", "warn",
        ],
        "data_dirs": ["."],
        "healthcheck": bash_http_check(member["address"], member["client_port"], "/health"),
        "labels": {"pdstack.version": version},
    }  # fmt: skip


def nats_config(server: Nats, topology: Topology, *, store_dir: str, store_mib: int, payload_mib: int) -> str:
    """Return nats.conf; JetStream stores in `store_dir`, at most `store_mib` MiB.

    With other servers in the topology it is a member of their cluster: the servers tell their clients of each other.
    """
    settings = {
        "server_name": server["server_name"],
        "listen": f"{bracketed(server['address'])}:{server['client_port']}",
        "http": f"{bracketed(server['address'])}:{server['monitor_port']}",
        # Prompts travel as JSON lists of token ids: NATS's own limit of 1 MiB is met at about 150,000 tokens.
        "max_payload": payload_mib * 1024 * 1024,
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items()]
    lines += [
        "jetstream {",
        f"  store_dir: {json.dumps(store_dir)}",
        f"  max_file_store: {store_mib * 1024 * 1024}",
        f"  max_memory_store: {64 * 1024 * 1024}",
        "}",
    ]
    if server["routes"]:
        lines += [
            "cluster {",
            f"  name: {json.dumps(container_name(topology['name'], 'nats'))}",
            f"  listen: {json.dumps(bracketed(server['address']) + ':' + str(server['cluster_port']))}",
            f"  routes: {json.dumps(server['routes'])}",
            "}",
        ]
    return "\n".join([*lines, ""])


def nats(server: Nats, *, image: str, version: str, config: str, entrypoint: Sequence[str] = ()) -> Spec:
    """Return the NATS server; `config` is the text of nats.conf, `entrypoint` as for etcd."""
    return {
        "name": "nats",
        "image": image,
        **({"entrypoint": list(entrypoint)} if entrypoint else {}),
        "command": ["--config", f"{CONFIG_MOUNT}/nats.conf"],
        "files": [{"path": "nats.conf", "content": config}],
        "data_dirs": ["."],
        "healthcheck": bash_http_check(server["address"], server["monitor_port"], "/healthz?js-enabled-only=true"),
        "labels": {"pdstack.version": version},
    }
