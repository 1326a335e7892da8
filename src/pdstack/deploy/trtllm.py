"""A TensorRT-LLM worker of Dynamo: its engine's YAML, its command line, its environment, its container.

Prefill and decode come from one description: what the role demands lies lowest, then `trtllm_engine_defaults`, then
`trtllm_engine` (each: `common`, then the role's own), then the `engine` of the worker's entry. What can be known to be
wrong with it is in `pdstack.deploy.trtllm_checks`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pdstack.deploy import fabrics, services
from pdstack.deploy.services import CHECK, Spec
from pdstack.deploy.topology import CONFIG_MOUNT, LOOPBACK, Frontend, Topology, Worker, bracketed
from pdstack.deploy.trtllm_fields import UNSET

ENGINE_FILE = "engine.yaml"
# The image's user, whose home and caches are writable to it alone.
USER = "1000:0"
# Dynamo's names for the two roles; the frontend looks for both.
COMPONENTS = {"prefill": "prefill", "decode": "tensorrt_llm"}
TOKENS_PER_BLOCK = 32
# As container/run.sh of Dynamo sets them. memlock is a setting: an engine in a container may not raise it.
ULIMITS = {"nofile": "65536:65536", "stack": "67108864:67108864"}
SHM_SIZE = "10g"
# A worker leaves in less than a second; freeing tens of GiB of GPU memory takes longer.
STOP_TIMEOUT_S = 60
HEALTH = (
    "import sys, urllib.request as r; r.build_opener(r.ProxyHandler({})).open(sys.argv[1], timeout=4).read()"
)  # fmt: skip


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mappings laid over each other, mappings in them too; a value of None replaces what is below it."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            if isinstance(value, Mapping):
                merged[key] = merge(below if isinstance(below, Mapping) else {}, value)
            else:
                merged[key] = value
    return merged


def engine_config(
    role: str,
    own: Mapping[str, Any],
    gpus: int,
    *,
    defaults: Mapping[str, Any],
    site: Mapping[str, Any],
    backend: str,
    max_input_tokens: int,
    timeout_ms: int,
) -> dict[str, Any]:
    """Return the engine's settings of a worker with `gpus` GPUs; `own` is the `engine` of its entry.

    `defaults` and `site` are trtllm_engine_defaults and trtllm_engine, `backend` kv_transfer_backend. The tensor
    parallel size is what the GPUs leave, unless it is given.
    """
    demanded: dict[str, Any] = {
        "backend": "pytorch",
        # The overlap scheduler is not for workers that only prefill.
        "disable_overlap_scheduler": role == "prefill",
        "kv_cache_config": {"tokens_per_block": TOKENS_PER_BLOCK},
        # Without a backend there is no transfer at all; with DEFAULT the image's environment decides.
        "cache_transceiver_config": {
            "backend": backend.upper(),
            "max_tokens_in_buffer": max_input_tokens,
            "kv_transfer_timeout_ms": timeout_ms,
        },
    }
    layers = [part.get(key) or {} for part in (defaults, site) for key in ("common", role)]
    config = merge(demanded, *layers, own)
    pipeline = config.setdefault("pipeline_parallel_size", 1)
    if "tensor_parallel_size" not in config:
        others = pipeline * config.get("context_parallel_size", 1)
        config["tensor_parallel_size"] = max(1, gpus // others)
    return config


def engine_yaml(config: Mapping[str, Any]) -> str:
    """Return the engine's file; values out of an inventory are of Ansible's own types, which YAML does not know."""
    return yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=True)


def block_size(defaults: Mapping[str, Any], site: Mapping[str, Any]) -> int:
    """Return the tokens in a KV block; it is one for all workers (see trtllm_checks)."""
    cache = merge(defaults.get("common") or {}, site.get("common") or {}).get("kv_cache_config") or {}
    return int(cache.get("tokens_per_block", TOKENS_PER_BLOCK))


def option(name: str, value: object) -> list[str]:
    """Return an option of the command line: a true flag by itself, a false one not at all."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag] if value else []
    return [flag, str(value)]


def command(
    entry: Worker,
    config: Mapping[str, Any],
    *,
    namespace: str,
    model_name: str,
    model_dir: str,
    options: Mapping[str, Any],
    router_mode: str,
    migration_limit: int,
) -> list[str]:
    """Return the command of a worker with the engine's settings `config`; `options` are trtllm_args and the entry's.

    What the engine's file says is said again where Dynamo reads it from its own options: the model card that the
    frontend routes by.
    """
    cache = config["kv_cache_config"]
    derived: dict[str, Any] = {
        "endpoint": f"dyn://{namespace}.{COMPONENTS[entry['role']]}.generate",
        "model_path": model_dir,
        "served_model_name": model_name,
        "disaggregation_mode": entry["role"],
        "extra_engine_args": f"{CONFIG_MOUNT}/{ENGINE_FILE}",
        "tensor_parallel_size": config["tensor_parallel_size"],
        "pipeline_parallel_size": config["pipeline_parallel_size"],
        "expert_parallel_size": config.get("moe_expert_parallel_size"),
        "gpus_per_node": len(entry["gpus"]),
        "kv_block_size": cache["tokens_per_block"],
        "max_batch_size": config.get("max_batch_size"),
        "max_num_tokens": config.get("max_num_tokens"),
        "max_seq_len": config.get("max_seq_len"),
        "max_beam_width": config.get("max_beam_width"),
        "free_gpu_memory_fraction": cache.get("free_gpu_memory_fraction"),
        # Dynamo's runtime refuses a prefill worker with another: "ModelType::Prefill requires migration_limit to be 0".
        "migration_limit": migration_limit if entry["role"] == "decode" else 0,
        # The KV router learns from prefill workers which of them holds which blocks; decode workers tell it nothing.
        "publish_events_and_metrics": router_mode == "kv" and entry["role"] == "prefill",
    }
    words = ["env", *(word for name in UNSET for word in ("-u", name)), "python3", "-m", "dynamo.trtllm"]
    for name, value in (derived | dict(options)).items():
        words += [] if value is None else option(name, value)
    return words


def environment(
    entry: Worker, topology: Topology, *, namespace: str, backend: str, fabric_env: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment of a worker; `fabric_env` is what the fabric's profile makes of the host and backend."""
    found = {
        "ETCD_ENDPOINTS": ",".join(topology["etcd_endpoints"]),
        "NATS_SERVER": entry["nats_server"],
        "DYN_NAMESPACE": namespace,
        "DYN_SYSTEM_HOST": entry["address"],
        "DYN_SYSTEM_PORT": str(entry["status_port"]),
        "DYN_LOG": "info",
        "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
        # The files are there; whatever is not is an error now and not a download later.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if backend == "nixl":
        found["TRTLLM_NIXL_PORT"] = str(entry["transfer_port"])
    return found | dict(fabric_env) | entry["env"]


def ulimits(fabric: Sequence[str], memlock: str) -> list[str]:
    """Return the limits of a container: the fabric's over the usual ones; `memlock` (-1: none) over both.

    An empty `memlock` is for engines that may not raise limits: what they give is left alone.
    """
    given = dict(limit.split(":", 1) for limit in fabric)
    found = {**ULIMITS, **given, "memlock": f"{memlock}:{memlock}"}
    if memlock == "":
        found = {name: limit for name, limit in given.items() if name != "memlock"}
    return [f"{name}:{value}" for name, value in sorted(found.items())]


def health_check(url: str, *, start_period: Any) -> dict[str, Any]:
    """Return a health check that wants HTTP 200 from `url`, with nothing but the image's python3."""
    return {"test": ["CMD", "python3", "-S", "-E", "-c", HEALTH, url], **CHECK, "start_period": start_period}


def worker(
    entry: Worker,
    topology: Topology,
    config: Mapping[str, Any],
    *,
    image: str,
    version: str,
    namespace: str,
    model_name: str,
    model_dir: str,
    options: Mapping[str, Any],
    router_mode: str,
    migration_limit: int,
    backend: str,
    fabric: Mapping[str, Any],
    fabric_env: Mapping[str, str],
    gpu_mode: str,
    gpu_devices: Sequence[str] = (),
    memlock: str = "-1",
    ready_timeout_s: int = 1800,
) -> Spec:
    """Return a worker with the engine's settings `config` (`engine_config`).

    `fabric` is what its profile makes of a container ({pid_mode, ipc_mode, devices, ulimits, capabilities, shm_size,
    gpu_visibility}), `gpu_mode` cdi or runtime, `gpu_devices` the host's /dev/nvidia*.
    """
    given = dict(options) | entry["args"]
    return {
        "name": entry["name"],
        "image": image,
        "command": command(
            entry, config, namespace=namespace, model_name=model_name, model_dir=model_dir, options=given,
            router_mode=router_mode, migration_limit=migration_limit,
        ),
        "env": environment(entry, topology, namespace=namespace, backend=backend, fabric_env=fabric_env),
        "user": USER,
        # The engine compiles kernels and keeps caches in its home.
        "read_only": False,
        "volumes": [f"{model_dir}:{model_dir}:ro"],
        "files": [{"path": ENGINE_FILE, "content": engine_yaml(config)}],
        "gpus": {
            "ids": list(entry["gpus"]),
            "mode": gpu_mode,
            "visible": fabric.get("gpu_visibility") or "own",
            "devices": nodes(gpu_devices, entry["gpus"], every=fabric.get("gpu_visibility") == "all"),
        },
        "devices": list(fabric.get("devices") or ()),
        "capabilities": list(fabric.get("capabilities") or ()),
        "ulimits": ulimits(fabric.get("ulimits") or (), str(memlock)),
        "pid_mode": fabric["pid_mode"],
        "ipc_mode": fabric["ipc_mode"],
        "shm_size": fabric.get("shm_size") or SHM_SIZE,
        "healthcheck": health_check(f"{entry['status_url']}/health", start_period=f"{ready_timeout_s}s"),
        "stop_timeout": STOP_TIMEOUT_S,
        "labels": {"pdstack.version": version, "pdstack.role": entry["role"], "pdstack.engine": "trtllm"},
    }  # fmt: skip


def nodes(devices: Sequence[str], gpus: Sequence[int], *, every: bool) -> list[str]:
    """Return those of the host's /dev/nvidia* that a container with `gpus` needs (`every`: with all GPUs), sorted."""
    own = {f"/dev/nvidia{number}" for number in gpus}
    common = {"/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset"}

    def wanted(path: str) -> bool:
        return path in own or path in common or (every and path.removeprefix("/dev/nvidia").isdigit())

    return sorted(path for path in devices if wanted(path))


def rendered(
    entry: Worker,
    topology: Topology,
    *,
    defaults: Mapping[str, Any],
    site: Mapping[str, Any],
    max_input_tokens: int,
    timeout_ms: int,
    backend: str,
    fabric: Mapping[str, Any],
    host: Mapping[str, Any],
    **known: Any,
) -> Spec:
    """Return a worker from the settings of the inventory.

    `fabric` is a profile of `kv_fabrics`, `host` the variables of the worker's host that it takes, `known` the rest of
    what `worker` takes.
    """
    config = engine_config(
        entry["role"], entry["engine"], len(entry["gpus"]), defaults=defaults, site=site, backend=backend,
        max_input_tokens=max_input_tokens, timeout_ms=timeout_ms,
    )  # fmt: skip
    return worker(
        entry, topology, config, backend=backend, fabric=fabrics.container(fabric),
        fabric_env=fabrics.environment(fabric, host, engine=fabrics.TRTLLM, backend=backend), **known,
    )  # fmt: skip


def frontend(entry: Frontend, topology: Topology, *, router_mode: str, **known: Any) -> Spec:
    """Return the frontend in the runtime image, whose entrypoint runs what it is given, as the image's user."""
    spec = services.frontend(entry, topology, router_mode=router_mode, **known)
    command = ["python3", "-m", *spec["command"]]
    if router_mode == "kv" and len(topology["frontends"]) > 1:
        # Else each knows only of the blocks and requests that went through it.
        command.append("--router-replica-sync")
    return {
        **spec,
        "command": command,
        "env": {**spec["env"], "HF_HUB_OFFLINE": "1"},
        "user": USER,
        "labels": {**spec["labels"], "pdstack.engine": "trtllm"},
    }


def answering(inspected: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return name and status URL of the running TensorRT-LLM workers among inspected containers."""
    found = []
    for container in inspected:
        env = dict(item.split("=", 1) for item in container["Config"]["Env"] or () if "=" in item)
        if container["State"]["Running"] and "DYN_SYSTEM_PORT" in env:
            url = f"http://{bracketed(env.get('DYN_SYSTEM_HOST', LOOPBACK))}:{env['DYN_SYSTEM_PORT']}"
            found.append({"name": str(container["Name"]).lstrip("/"), "url": url})
    return found


def inflight(metrics: str) -> int:
    """Return the requests that a worker works on, from its /metrics (Prometheus text)."""
    total = 0.0
    for line in metrics.splitlines():
        if line.startswith("dynamo_component_inflight_requests") and not line.startswith("#"):
            total += float(line.rsplit(" ", 1)[1])
    return int(total)
