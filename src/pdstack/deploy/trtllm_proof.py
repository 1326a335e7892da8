"""What a deployment with engine trtllm must show, and what is wrong if it does not; `tests/testinfra` measures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pdstack.deploy import fabrics, ucx_log
from pdstack.deploy.problem import Problem
from pdstack.deploy.proof import metric
from pdstack.deploy.trtllm import COMPONENTS as COMPONENTS
from pdstack.deploy.trtllm import engine_config

# What a worker counts its requests in, by the component's name.
REQUESTS = "dynamo_component_requests_total"
ANSWER_TOKENS = 8
# Likely causes and what to do, by what UCX took and what the fabric promises; the first that fits.
_CAUSES: tuple[tuple[set[str], set[str], str, str], ...] = (
    ({"sysv", "posix", "cma"}, {"cuda_ipc"}, "UCX reads over cuda_ipc by itself only where the GPUs have NVLink",
     "kv_fabric: pcie_single (it sets UCX_CUDA_IPC_ENABLE_GET_ZCOPY=on)"),
    ({"tcp"}, {"cuda_ipc"}, "the workers do not share PID and IPC namespace, or do not see each other's GPU",
     "pid_mode: host, ipc_mode: host and gpu_visibility: all in the profile; no tcp in its UCX_TLS"),
    ({"tcp"}, {"rc_mlx5", "rc_verbs", "dc_mlx5"}, "UCX found no usable RDMA device in the container",
     "/dev/infiniband in the profile's devices, kv_net_devices of the host, memlock unlimited; no tcp in UCX_TLS"),
    ({"rc_mlx5", "rc_verbs"}, {"cuda_ipc"}, "the GPUs are not in one NVLink domain, or there is no IMEX channel",
     "kv_fabric: nvlink_domains, or bring IMEX up (`nvidia-smi -q` shows Fabric.ClusterUUID)"),
)  # fmt: skip


def expected(
    topology: Mapping[str, Any],
    hosts: Mapping[str, Mapping[str, Any]],
    profiles: Mapping[str, Mapping[str, Any]],
    *,
    backend: str,
    engine: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Return for each worker's name what it must show: fabric, environment, transports, transceiver settings.

    `hosts` are the variables of the workers' hosts (kv_fabric, kv_net_devices, kv_interface), `engine` the settings
    that `trtllm.engine_config` takes by name.
    """
    found = {}
    for worker in topology["workers"]:
        variables = hosts[worker["host"]]
        name = str(variables["kv_fabric"])
        profile = profiles[name]
        peers = [other["host"] for other in topology["workers"] if other["role"] != worker["role"]]
        config = engine_config(worker["role"], worker["engine"], len(worker["gpus"]), backend=backend, **engine)
        environment = fabrics.environment(
            profile, variables, engine=fabrics.TRTLLM, backend=backend, port=int(worker["transfer_port"])
        )
        found[worker["name"]] = {
            "fabric": name,
            "environment": {**environment, **worker["env"]},
            "promised": list(fabrics.promised(profile, same_host=worker["host"] in peers)),
            "transceiver": config["cache_transceiver_config"],
            "max_seq_len": config.get("max_seq_len"),
        }
    return found


def environment(raw: str) -> dict[str, str]:
    """Return the variables in a /proc/PID/environ whose NULs are newlines; lines that are no variable are skipped."""
    return dict(line.split("=", 1) for line in raw.splitlines() if "=" in line)


def environment_problems(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return what a running process's environment has and must not have, lacks, or has with another value."""
    problems = [
        f"{key} is {found.get(key, 'not set')!r}, wanted {value!r}"
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    switches = [key for key in found if key.startswith("TRTLLM_USE_") and key.endswith("KVCACHE")]
    problems += [f"{key}={found[key]} is set: it chooses a backend beside the engine's file" for key in switches]
    known = {key for key in found if key.startswith("UCX_")} - set(wanted)
    # The image's own; what a fabric does not name must not be there.
    problems += [f"{key}={found[key]} is set, and the fabric does not name it" for key in sorted(known - IMAGE_UCX)]
    return problems


# Where the image's UCX lies is the image's business.
IMAGE_UCX = frozenset({"UCX_MODULE_DIR", "UCX_LOG_FILE", "UCX_HANDLE_ERRORS"})


def descendants(listed: str, root: int) -> list[tuple[int, str]]:
    """Return (pid, command line) of `root` and all below it, from `docker top CONTAINER -eo pid,ppid,args`."""
    rows = []
    for line in listed.splitlines()[1:]:
        parts = line.split(None, 2)
        if len(parts) == 3 and parts[0].isdigit() and parts[1].isdigit():
            rows.append((int(parts[0]), int(parts[1]), parts[2]))
    inside = {root}
    # Parents come before their children only mostly.
    for _ in rows:
        grown = inside | {pid for pid, parent, _ in rows if parent in inside}
        if grown == inside:
            break
        inside = grown
    return [(pid, args) for pid, _, args in rows if pid in inside]


def transport_problem(worker: str, found: Sequence[str], promised: Sequence[str], fabric: str) -> Problem | None:
    """Return what is wrong with the transports that UCX took for KV, None when the fabric promises them all."""
    other = [name for name in found if name not in promised]
    if not other:
        return None
    cause, fix = "the profile does not fit the host", "choose the profile of kv_fabrics that fits (docs/fabrics.md)"
    for taken, wanted, why, what in _CAUSES:
        if taken & set(other) and wanted & set(promised):
            cause, fix = why, what
            break
    return Problem(
        f"KV of {worker} (kv_fabric {fabric})", f"transport {', '.join(other)}", f"one of {', '.join(promised)}",
        f"likely cause: {cause}; {fix}",
    )  # fmt: skip


def log_problems(worker: str, role: str, log: str, wanted: Mapping[str, Any], backend: str) -> list[Problem]:
    """Return what a worker's log says against the deployment: another transceiver, another transport, complaints."""
    problems = []
    told = ucx_log.transceiver(log)
    if told != backend:
        problems.append(
            Problem(
                f"transceiver of {worker} ({role})", told or "nothing in its log", f"kv_transfer_backend: {backend}",
                "cache_transceiver_config.backend in its engine.yaml; deploy again, a worker reads it when it starts",
            )
        )  # fmt: skip
    bad = transport_problem(worker, ucx_log.kv_transports(log), wanted["promised"], str(wanted["fabric"]))
    problems += [bad] if bad else []
    for line in ucx_log.complaints(log):
        if "unused environment variable" in line and "UCX_CUDA" not in line and "UCX_IB" not in line:
            problems.append(
                Problem(
                    f"UCX of {worker} ({role})", line, "variables that UCX knows", "correct the profile's env",
                )
            )  # fmt: skip
    return problems


def counted(
    before: Mapping[str, str], after: Mapping[str, str], workers: Iterable[Mapping[str, Any]]
) -> dict[str, int]:
    """Return how many requests each role served between two readings of /metrics (worker name -> Prometheus text)."""
    result = dict.fromkeys(COMPONENTS, 0)
    for worker in workers:
        labels = {"dynamo_component": COMPONENTS[worker["role"]], "dynamo_endpoint": "generate"}
        name = worker["name"]
        result[worker["role"]] += int(
            metric(after[name], REQUESTS, **labels) - metric(before[name], REQUESTS, **labels)
        )
    return result


def prompt_lengths(buffer: int, context: int) -> dict[str, int | None]:
    """Return the prompts to ask, in tokens: a short one, one near the buffer's limit, one beyond it.

    `context` is the model's; None where the model takes no prompt of that length.
    """
    most = context - ANSWER_TOKENS - 1
    beyond = buffer + 1
    return {
        "short": min(24, most),
        "near the limit": min(buffer - 1, most),
        "beyond the buffer": beyond if beyond <= most else None,
    }
