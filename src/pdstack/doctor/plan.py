"""What the inventory wants of a host, in the words that `checks` judges by.

`build` makes it of the deployment; `default` makes it of the facts of a host that no inventory names: what is on its
PCI bus is what is wanted. Standard library only, for Python >= 3.9.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# What a host must have at least, where the versions file does not say.
GPU_VERSIONS = {
    "driver": "580.105.08",
    "driver_minimum": "580.65.06",
    "toolkit_minimum": "1.17.8",
    "docker_minimum": "23.0",
    "docker_cdi": "25.0",
}
DOCKER_ROOT = "/var/lib/docker"
# The runtime image beside its archive, and a model of 45 billion parameters in 16 bits; doctor_disk_mib changes them.
IMAGE_MIB = 60 * 1024
MODEL_MIB = 90 * 1024
# A service of the reference engine, etcd or NATS.
SMALL_MIB = 2 * 1024
SHM_MIB = 10 * 1024
# Half of what each way can do, in MB/s: NVLink 4 and PCIe 5 x16 between two GPUs, one 400 Gb/s port, loopback TCP.
LEAST_MB_S = {"nvlink": 100_000, "pcie": 20_000, "rdma": 20_000, "tcp": 500}
RDMA = ("rc", "dc", "ud", "ib")
# The Ansible roles that mend what is not right, unless `ROLE__manage` is off for the host.
ROLES = ("gpu_driver", "host_tuning", "nvidia_toolkit", "rdma")
INTERFACES = ("TRTLLM_UCX_INTERFACE", "TRTLLM_NIXL_INTERFACE")
# The user of Dynamo's runtime image.
IMAGE_USER = {"uid": 1000, "gid": 0}


def number(value: Any, otherwise: int) -> int:
    """Return a whole number, `otherwise` if it is none."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return otherwise


def on(value: Any) -> bool:
    """Say whether a switch is on; the command line gives text."""
    return str(value).lower() in ("true", "yes", "on", "1")


def fabric(name: str, profile: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a fabric's profile asks of a host."""
    transports = [str(entry) for entry in profile.get("transports") or ()]
    rdma = profile.get("net_devices") == "rdma" or any(entry.split("_")[0] in RDMA for entry in transports)
    ipc = "cuda_ipc" in transports
    # Without the switch UCX reads over cuda_ipc only where it finds NVLink.
    without = str((profile.get("env") or {}).get("UCX_CUDA_IPC_ENABLE_GET_ZCOPY", "")).lower() in (
        "on",
        "y",
        "yes",
        "1",
    )
    nvlink = ipc and not without
    kind = "nvlink" if nvlink else "pcie" if ipc else "rdma" if rdma else "tcp"
    return {
        "name": name,
        "scope": profile.get("scope") or ("host" if profile.get("pid_mode") == "host" else "network"),
        "transports": transports,
        "rdma": rdma,
        "ipc": ipc,
        "nvlink": nvlink,
        "pid_mode": profile.get("pid_mode") or "private",
        "ipc_mode": profile.get("ipc_mode") or "private",
        "least_mb_s": LEAST_MB_S[kind],
    }


def empty() -> dict[str, Any]:
    """Return the plan of a host of which nothing is wanted."""
    return {
        "host": "",
        "address": "",
        "deployment": "",
        "engine": "trtllm",
        "roles": [],
        "gpu_host": False,
        "gpu_count": 0,
        "gpus_used": [],
        "unmanaged": [],
        "allow_unlisted_os": False,
        "driver_signed": False,
        **GPU_VERSIONS,
        "gpu_request": "auto",
        "mig": "Disabled",
        "fabric": fabric("none", {}),
        "net_devices": [],
        "interface": "",
        "env_interfaces": [],
        "ucx_interfaces": [],
        "ucx_ports": "",
        "gid_index": "",
        "gdrcopy": False,
        "mtu": None,
        "peer_mtu": {},
        "ports": [],
        "network": True,
        "reach": [],
        "etcd": [],
        "etcd_member": "",
        "nats": [],
        "nats_auth": False,
        "disk_mib": {DOCKER_ROOT: SMALL_MIB},
        "shm_mib": SHM_MIB,
        "model_dir": "",
        "image": "",
        "image_user": IMAGE_USER,
        "image_versions": {},
        "worker_containers": [],
        "env": {},
    }


def default(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan of a host without an inventory: the GPUs and RDMA ports that it has."""
    gpus = max(len(facts["pci"]["gpus"]), len(facts["driver"]["nvidia_smi"]["gpus"]))
    rdma = bool(facts["rdma"]["devices"])
    profile = {"net_devices": "rdma" if rdma else "none", "scope": "host"}
    wanted = empty() | {
        "host": "this host",
        "gpu_host": gpus > 0,
        "gpu_count": gpus,
        "fabric": fabric("of this host's devices", profile) | {"ipc_mode": "host"},
        "image_versions": {"ai-dynamo": "0.7.0.post1", "tensorrt-llm": "1.2.0rc3"},
    }
    if gpus:
        wanted["disk_mib"] = {DOCKER_ROOT: IMAGE_MIB}
    return wanted


def build(
    topology: Mapping[str, Any], host: str, settings: Mapping[str, Any], hostvars: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what the deployment wants of `host`.

    `settings` is `pdstack_settings`; `hostvars` gives every host's variables, and its facts as `pdstack_probe` once
    they were read (for what must be equal on all hosts).
    """
    # A host that carries the doctor alone has no deployment to plan.
    from pdstack.deploy import fabrics
    from pdstack.deploy.topology import host_address, port_uses

    variables = hostvars[host]
    workers = [worker for worker in topology["workers"] if worker["host"] == host]
    gpu_host = bool(workers) and settings.get("engine") == fabrics.TRTLLM
    etcd = [member for member in topology["etcd"] if member["host"] == host]
    name = str(variables.get("kv_fabric") or settings.get("kv_fabric") or "")
    engine = str(settings.get("engine") or "reference")
    profile: dict[str, Any] = {}
    env: dict[str, str] = {}
    if workers and name in (settings.get("kv_fabrics") or {}):
        profile = fabrics.effective(settings["kv_fabrics"][name], engine)
        backend = str(settings.get("kv_transfer_backend") or "ucx")
        env = fabrics.environment(settings["kv_fabrics"][name], variables, engine=engine, backend=backend)
    for worker in workers:
        env |= worker["env"]
    carried = fabric(name, profile)
    if "cuda_ipc" in (profile.get("same_host") or ()) and len({worker["role"] for worker in workers}) > 1:
        carried["ipc"] = True
    versions = settings.get("versions") or {}
    used = sorted({index for worker in workers for index in worker.get("gpus") or ()})
    wanted = empty() | {
        "host": host,
        "address": host_address(host, variables),
        "deployment": topology["name"],
        "engine": engine,
        "roles": _roles(topology, host),
        "gpu_host": gpu_host,
        "gpu_count": number(variables.get("gpu_count"), max(used) + 1 if used else 0) if gpu_host else 0,
        "gpus_used": used,
        "unmanaged": [role for role in ROLES if not on(variables.get(f"{role}__manage", True))],
        "allow_unlisted_os": on(variables.get("allow_unlisted_os", False)),
        "driver_signed": str(variables.get("gpu_driver__source") or "") == "distribution",
        **{key: str((versions.get("gpu") or {}).get(key, value)) for key, value in GPU_VERSIONS.items()},
        "gpu_request": str(variables.get("gpu_request") or settings.get("gpu_request") or "auto"),
        "mig": str(variables.get("gpu_mig") or "Disabled"),
        "fabric": carried,
        "net_devices": [str(entry) for entry in variables.get("kv_net_devices") or ()],
        "interface": str(variables.get("kv_interface") or ""),
        "env_interfaces": sorted({env[key] for key in INTERFACES if env.get(key)}),
        "ucx_interfaces": _ucx_interfaces(env),
        "ucx_ports": env.get("UCX_TCP_PORT_RANGE", ""),
        "gid_index": env.get("UCX_IB_GID_INDEX", ""),
        "gdrcopy": on(variables.get("gdrcopy__manage", False)),
        "mtu": number(variables.get("kv_mtu"), 0) or None,
        "peer_mtu": _peer_mtu(topology, host, hostvars) if workers else {},
        # The caller's own TypedDict; port_uses reads no more than its keys.
        "ports": [dict(use) for use in port_uses(topology) if use["host"] == host],  # type: ignore[arg-type]
        "network": on(variables.get("doctor_network", True)),
        "reach": _reach(topology, host),
        "etcd": [member["client_url"] for member in topology["etcd"]],
        "etcd_member": etcd[0]["client_url"] if etcd else "",
        "nats": [server["url"] for server in topology["nats"]],
        "model_dir": str(variables.get("pdstack_model_dir") or settings.get("pdstack_model_dir") or ""),
        "image_versions": {
            "ai-dynamo": str(versions.get("dynamo", "")), "tensorrt-llm": str(versions.get("tensorrt_llm", "")),
        },
        "worker_containers": [worker["container"] for worker in workers],
        "env": env,
    }  # fmt: skip
    wanted["disk_mib"] = variables.get("doctor_disk_mib") or _disk(wanted)
    return wanted


def _roles(topology: Mapping[str, Any], host: str) -> list[str]:
    kinds = {"etcd": "etcd", "nats": "nats", "frontends": "frontend"}
    found = [label for kind, label in kinds.items() if any(entry["host"] == host for entry in topology[kind])]
    return found + sorted({worker["role"] for worker in topology["workers"] if worker["host"] == host})


def _disk(wanted: Mapping[str, Any]) -> dict[str, int]:
    if not wanted["gpu_host"]:
        return {DOCKER_ROOT: SMALL_MIB}
    model = {wanted["model_dir"]: MODEL_MIB} if wanted["model_dir"] else {}
    return {DOCKER_ROOT: IMAGE_MIB, **model}


def _ucx_interfaces(env: Mapping[str, str]) -> list[str]:
    """Return the network interfaces that UCX_NET_DEVICES names (devices of RDMA have a port behind a colon)."""
    names = env.get("UCX_NET_DEVICES", "").split(",")
    return [name for name in names if name and ":" not in name and name not in ("all", "lo")]


def _reach(topology: Mapping[str, Any], host: str) -> list[str]:
    """Return the HOST:PORT that services of this host call on other hosts: etcd and NATS."""
    callers = {entry["host"] for kind in ("frontends", "workers") for entry in topology[kind]}
    if host not in callers:
        return []
    entries = [*topology["etcd"], *topology["nats"]]
    return [f"{_bracketed(entry['address'])}:{entry['client_port']}" for entry in entries if entry["host"] != host]


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _peer_mtu(
    topology: Mapping[str, Any], host: str, hostvars: Mapping[str, Mapping[str, Any]]
) -> dict[str, int | None]:
    """Return the MTU of the interfaces by which the other workers' hosts are reached, where it was read."""
    from pdstack.deploy.topology import host_address

    found = {}
    for peer in dict.fromkeys(worker["host"] for worker in topology["workers"] if worker["host"] != host):
        variables = hostvars[peer]
        facts = variables.get("pdstack_probe") or {}
        name, address = variables.get("kv_interface"), host_address(peer, variables)
        for entry in (facts.get("net") or {}).get("interfaces") or ():
            if entry["name"] == name or (not name and address in (entry["addresses"] or ())):
                found[peer] = entry["mtu"]
    return found


def probe_options(wanted: Mapping[str, Any], root: str = "/", *, image: str = "", perf: bool = False) -> list[str]:
    """Return the probe's command line for a plan; with `image` it starts containers."""
    options = ["--root", root]
    paths: Sequence[str] = [*wanted["disk_mib"], *([wanted["model_dir"]] if wanted["model_dir"] else [])]
    asked = {"--path": list(dict.fromkeys(paths))}
    if wanted["network"]:
        asked |= {"--reach": wanted["reach"], "--etcd": wanted["etcd"], "--nats": wanted["nats"]}
    for option, values in asked.items():
        for value in values:
            options += [option, value]
    if image and wanted["gpu_host"]:
        options += ["--image", image]
        options += [f"--run-option={option}" for option in run_options(wanted)]
        for key, value in sorted(wanted["env"].items()):
            if re.match(r"UCX_|NIXL_|TRTLLM_", key):
                options += ["--image-env", f"{key}={value}"]
        if perf:
            options.append("--perf")
    return options


def run_options(wanted: Mapping[str, Any]) -> list[str]:
    """Return the options of `docker run` for a container that stands for a worker's."""
    profile = wanted["fabric"]
    options = ["--network=host", "--ulimit=memlock=-1"]
    options.append("--device=nvidia.com/gpu=all" if wanted["gpu_request"] == "cdi" else "--gpus=all")
    options += [f"--{key}=host" for key, mode in (("pid", "pid_mode"), ("ipc", "ipc_mode")) if profile[mode] == "host"]
    if profile["rdma"]:
        options.append("--device=/dev/infiniband")
    return options
