"""One service described by one dict, turned into what the file and container modules take.

The dict is `service__spec` of the Ansible role `service`; its keys and types are declared in that role's
argument_specs. Here is what types cannot say (`errors`) and what follows from it (`plan`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, TypedDict

CONFIG_MOUNT = "/etc/pdstack"
# A container's name is its hostname too, and Linux cuts hostnames at 64 bytes.
MAX_HOSTNAME = 63
NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# The whole world may not read a configuration: it names peers and, in secrets, carries keys.
DEFAULT_MODE = "0440"


class DeviceRequest(TypedDict):
    """Devices by the names of a driver. Every key is given: what the engine keeps then equals what is wanted."""

    driver: str
    count: int
    device_ids: list[str]
    capabilities: list[list[str]]
    options: dict[str, str]


class Gpus(TypedDict):
    """What makes a container see its GPUs."""

    runtime: str
    device_requests: list[DeviceRequest]
    devices: list[str]
    env: dict[str, str]


class Plan(TypedDict):
    """What the tasks of the role need, ready for their module parameters."""

    container: str
    user: str
    owner: int
    group: int
    runtime: str
    device_requests: list[DeviceRequest]
    devices: list[str]
    pid_mode: str
    security_opts: list[str]
    env: dict[str, str]
    volumes: list[str]
    labels: dict[str, str]
    config_dir: str
    files: list[dict[str, str]]
    secrets: list[dict[str, str]]
    data_dirs: list[str]
    data_roots: list[str]


def container_name(deployment: str, service: str) -> str:
    """Return the name (and hostname) of a service's container."""
    return f"pdstack-{deployment}-{service}"


def config_digest(files: Sequence[Mapping[str, Any]]) -> str:
    """Return a SHA-256 (hex) over paths, modes and contents of the files, in any order."""
    parts = sorted((str(f["path"]), str(f.get("mode") or DEFAULT_MODE), str(f["content"])) for f in files)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def env_value(value: object) -> str:
    """Return an environment value as text; true and false in lower case, as every program of ours reads them."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def security_opts(spec: Mapping[str, Any]) -> list[str]:
    """Return the security options of the container.

    An engine adds label=disable by itself to a container that shares the host's PID or IPC namespace (two SELinux
    labels cannot share one), so it is named here: the container that is found then equals the one that is wanted.
    """
    shares = "host" in (spec.get("pid_mode"), spec.get("ipc_mode"))
    return ["no-new-privileges:true", *(["label=disable"] if shares else [])]


def gpus(wanted: Mapping[str, Any]) -> Gpus:
    """Return what gives a container the GPUs `wanted` ({ids, mode, visible, devices}; empty: none).

    mode cdi: the engine itself adds the devices, so that nothing takes them away again. mode runtime: the runtime
    `nvidia` adds them behind the engine's back, and with the systemd cgroup driver a daemon-reload takes them away;
    `devices` (the /dev/nvidia* of the host) name them to the engine as well.

    visible own: the container has its GPUs alone, which CUDA counts from 0. visible all: it has every GPU of the host,
    as processes must that read each other's memory, and CUDA_VISIBLE_DEVICES picks.
    """
    if not wanted:
        return {"runtime": "", "device_requests": [], "devices": [], "env": {}}
    ids = [int(number) for number in wanted["ids"]]
    every = wanted.get("visible") == "all"
    picked = ids if every else range(len(ids))
    # nvidia-smi and the runtime count by PCI address; CUDA, unless told so, by speed.
    env = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, picked))}
    if wanted["mode"] == "cdi":
        names = ["nvidia.com/gpu=all"] if every else [f"nvidia.com/gpu={number}" for number in ids]
        request: DeviceRequest = {
            "driver": "cdi", "count": 0, "device_ids": names, "capabilities": [], "options": {},
        }  # fmt: skip
        # CUDA images ask for all GPUs in their environment; where `nvidia` is the default runtime it would obey.
        env["NVIDIA_VISIBLE_DEVICES"] = "void"
        return {"runtime": "", "device_requests": [request], "devices": [], "env": env}
    env["NVIDIA_VISIBLE_DEVICES"] = "all" if every else ",".join(map(str, ids))
    env["NVIDIA_DRIVER_CAPABILITIES"] = "compute,utility"
    devices = [str(path) for path in wanted.get("devices") or []]
    return {"runtime": "nvidia", "device_requests": [], "devices": devices, "env": env}


def gpu_errors(wanted: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the GPUs of a spec."""
    if not wanted:
        return []
    found = []
    ids = list(wanted.get("ids") or [])
    if not ids:
        found.append("gpus: found no ids, wanted the numbers of the container's GPUs, as nvidia-smi counts them")
    if len(set(ids)) != len(ids):
        found.append(f"gpus: found the ids {ids}, wanted each GPU once")
    return found


def data_path(entry: str, root: PurePosixPath) -> PurePosixPath:
    """Return the host path of a data directory: an absolute one as it is, others below the service's own."""
    return root / entry


def errors(spec: Mapping[str, Any], deployment: str) -> list[str]:
    """Return what is wrong with a spec, as sentences that say where, found and wanted; empty when it is right."""
    name = str(spec.get("name", ""))
    where = f"service {name!r} of deployment {deployment!r}"
    found: list[str] = []
    if not NAME.fullmatch(name):
        found.append(f"{where}: found name {name!r}, wanted lower-case letters, digits and inner hyphens")
    container = container_name(deployment, name)
    if len(container) > MAX_HOSTNAME:
        found.append(
            f"{where}: its container would be {container!r}, {len(container)} characters; a hostname has at most "
            f"{MAX_HOSTNAME}; shorten pdstack_name or the service's name"
        )
    image = str(spec.get("image", ""))
    if not ("@sha256:" in image or ":" in image.rsplit("/", 1)[-1]):
        found.append(f"{where}: found image {image!r}, wanted a pinned one (name:tag or name@sha256:...)")
    found += [f"{where}: {problem}" for problem in file_errors(spec.get("files") or [])]
    found += [
        f"{where}: data directory {entry!r} has '..' in it; wanted a path below the service's data directory"
        for entry in spec.get("data_dirs") or []
        if ".." in PurePosixPath(entry).parts
    ]
    found += [
        f"{where}: found environment variable {key!r}, wanted letters, digits and underscores"
        for key in spec.get("env") or {}
        if not ENV_NAME.fullmatch(str(key))
    ]
    found += [f"{where}: {problem}" for problem in gpu_errors(spec.get("gpus") or {})]
    if not re.fullmatch(r"[0-9]+(:[0-9]+)?", user := str(spec.get("user") or "0")):
        found.append(f"{where}: found user {user!r}, wanted numbers (uid:gid): a name means another user in each image")
    return found


def file_errors(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with the paths and modes of a spec's files."""
    found: list[str] = []
    seen: set[str] = set()
    for file in files:
        path = str(file["path"])
        pure = PurePosixPath(path)
        if not path or pure.is_absolute() or ".." in pure.parts or str(pure) != path:
            found.append(f"found file path {path!r}, wanted one relative to {CONFIG_MOUNT}, without '..'")
        if path in seen:
            found.append(f"two files have the path {path!r}; wanted each once")
        seen.add(path)
        mode = str(file.get("mode") or DEFAULT_MODE)
        if not re.fullmatch(r"0[0-7]{3}", mode):
            found.append(
                f"file {path!r} has mode {mode!r}; wanted four octal digits in quotes, such as {DEFAULT_MODE!r}"
            )
        elif file.get("secret") and int(mode, 8) & 0o007:
            found.append(f"secret file {path!r} has mode {mode!r}, which everyone may use; wanted {DEFAULT_MODE!r}")
    return found


def plan(spec: Mapping[str, Any], *, deployment: str, config_dir: str, data_dir: str, uid: int | str) -> Plan:
    """Return what follows from a valid spec.

    `config_dir` and `data_dir` are the deployment's; the service gets one directory of its own name in each, the
    first mounted read-only at /etc/pdstack, the data directories at the path they have on the host.
    """
    name = str(spec["name"])
    files = [
        {"path": str(f["path"]), "content": str(f["content"]), "mode": str(f.get("mode") or DEFAULT_MODE)}
        for f in spec.get("files") or []
    ]
    secret = {str(f["path"]) for f in spec.get("files") or [] if f.get("secret")}
    own_config = str(PurePosixPath(config_dir) / name)
    own_data = PurePosixPath(data_dir) / name
    data_dirs = list(dict.fromkeys(str(data_path(str(entry), own_data)) for entry in spec.get("data_dirs") or []))
    volumes = [f"{own_config}:{CONFIG_MOUNT}:ro"] if files else []
    volumes += [f"{path}:{path}:rw" for path in data_dirs]
    given = gpus(spec.get("gpus") or {})
    owner, _, group = str(spec.get("user") or f"{uid}:{uid}").partition(":")
    return {
        "container": container_name(deployment, name),
        "user": f"{owner}:{group or owner}",
        # Its files belong to the user that the container runs as.
        "owner": int(owner),
        "group": int(group or owner),
        "runtime": str(spec.get("runtime") or given["runtime"]),
        "device_requests": given["device_requests"],
        "devices": [*(str(path) for path in spec.get("devices") or []), *given["devices"]],
        # Docker knows no word for a PID namespace of one's own: it is what it does when nothing is said.
        "pid_mode": "" if spec.get("pid_mode") in (None, "private") else str(spec["pid_mode"]),
        "security_opts": security_opts(spec),
        "env": {"RUST_BACKTRACE": "0"}
        | given["env"]
        | {str(k): env_value(v) for k, v in (spec.get("env") or {}).items()},
        "volumes": volumes + [str(volume) for volume in spec.get("volumes") or []],
        "labels": {str(k): str(v) for k, v in (spec.get("labels") or {}).items()}
        | {"pdstack.deployment": deployment, "pdstack.service": name, "pdstack.config": config_digest(files)},
        "config_dir": own_config,
        "files": [f for f in files if f["path"] not in secret],
        "secrets": [f for f in files if f["path"] in secret],
        "data_dirs": data_dirs,
        "data_roots": [str(own_data), *(p for p in data_dirs if not PurePosixPath(p).is_relative_to(own_data))],
    }
