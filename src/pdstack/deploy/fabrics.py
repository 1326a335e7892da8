"""A profile of `kv_fabrics` as what a worker's container gets, and as what verify must see afterwards.

`environment` and `container` are what services.py and trtllm.py render, `promised` is what verify and the roles ucx and
nixl demand, `problems` is what validate says of a profile and a host that contradict each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pdstack.deploy.problem import Problem, show

TRTLLM = "trtllm"
BACKENDS = ("ucx", "nixl")
# The reference engine's own ways beside the backend (pdstack.transfer.paths).
OWN_PATHS = ("shared", "cma", "stream")
# What an alias of UCX_TLS stands for (ucp_context.c, ucp_tl_aliases, UCX 1.19).
ALIASES: dict[str, tuple[str, ...]] = {
    "rc": ("rc_verbs", "rc_mlx5"),
    "rc_x": ("rc_mlx5",),
    "rc_v": ("rc_verbs",),
    "ud": ("ud_verbs", "ud_mlx5"),
    "ud_x": ("ud_mlx5",),
    "ud_v": ("ud_verbs",),
    "dc": ("dc_mlx5",),
    "dc_x": ("dc_mlx5",),
    "ib": ("rc_verbs", "ud_verbs", "rc_mlx5", "ud_mlx5", "dc_mlx5", "rdmacm"),
    "mm": ("posix", "sysv", "xpmem"),
    "sm": ("posix", "sysv", "xpmem", "cma", "knem"),
    "shm": ("posix", "sysv", "xpmem", "cma", "knem"),
    "cuda": ("cuda_copy", "cuda_ipc", "gdr_copy"),
    "ugni": ("ugni_smsg", "ugni_udt", "ugni_rdma"),
}
# The alias of each brings what it needs beside it; naming it alone breaks the wire-up, or GPU memory. cuda_copy stands
# alone where GPU memory is to be copied and never opened by the peer (profile tcp).
_EXACT = {
    "rc_verbs": "rc",
    "rc_mlx5": "rc",
    "dc_mlx5": "dc",
    "cuda_ipc": "cuda",
    "gdr_copy": "cuda",
}
# Every profile with engine trtllm has it: the log then says which transport UCX chose.
PROTO_INFO = {"UCX_PROTO_INFO": "y"}
# The image's libraries find each other by these; several copies of NIXL lie in it, and only this order matches.
_LIBRARIES = ("LD_LIBRARY_PATH", "LD_PRELOAD", "NIXL_PLUGIN_DIR", "NIXL_PLUGINS_DIR", "UCX_MODULE_DIR")
_CONTAINER = ("pid_mode", "ipc_mode", "devices", "ulimits", "capabilities", "shm_size", "gpu_visibility")

Profile = Mapping[str, Any]


def effective(profile: Profile, engine: str) -> dict[str, Any]:
    """Return the profile as `engine` sees it: with what its `gpu` part adds and replaces, and without that part."""
    plain = {key: value for key, value in profile.items() if key != "gpu"}
    if engine != TRTLLM:
        return plain
    extra = dict(profile.get("gpu") or {})
    return {**plain, **extra, "env": {**plain["env"], **extra.get("env", {})}}


def environment(
    profile: Profile, variables: Mapping[str, Any], *, engine: str, backend: str, port: int | None = None
) -> dict[str, str]:
    """Return the variables of a worker's container on a host with `variables`; nothing of it is checked here.

    `port` is where the ranks of a worker listen with backend nixl (`TRTLLM_NIXL_PORT`). One backend's variables never
    reach the other: NIXL sets UCX_RNDV_THRESH to inf unless the environment has it, and then behaves otherwise.
    """
    known = effective(profile, engine)
    found = {str(key): str(value) for key, value in known["env"].items()}
    interface = str(variables.get("kv_interface") or "")
    devices = [str(device) for device in variables.get("kv_net_devices") or ()]
    wanted = known.get("net_devices", "none")
    if wanted == "rdma" and devices:
        found["UCX_NET_DEVICES"] = ",".join(devices)
    elif wanted == "interface" and interface:
        found["UCX_NET_DEVICES"] = interface
    if engine == TRTLLM:
        found |= {str(key): str(value) for key, value in (known.get(f"{backend}_env") or {}).items()}
        found |= PROTO_INFO
        if interface:
            # Else TensorRT-LLM asks for the route to a public address (ucx) or takes the first interface (nixl).
            found[f"TRTLLM_{backend.upper()}_INTERFACE"] = interface
        if backend == "nixl" and port is not None:
            found["TRTLLM_NIXL_PORT"] = str(port)
    return found


def container(profile: Profile, engine: str = TRTLLM) -> dict[str, Any]:
    """Return how a worker's container is joined to its host: the keys of a service's dict, as far as they are set."""
    known = effective(profile, engine)
    return {key: known[key] for key in _CONTAINER if known.get(key)}


def expand(transports: Sequence[str]) -> tuple[str, ...]:
    """Return the names that UCX prints for `transports`, aliases replaced by what they stand for."""
    return tuple(dict.fromkeys(name for given in transports for name in ALIASES.get(given, (given,))))


def promised(profile: Profile, same_host: bool, engine: str = TRTLLM) -> tuple[str, ...]:
    """Return the transports that KV may go over, by the names UCX prints; verify must see one, and no other."""
    known = effective(profile, engine)
    return expand([*known["transports"], *(known.get("same_host", ()) if same_host else ())])


def wanted(profile: Profile, path: str) -> list[str]:
    """Return what may carry KV of the reference engine with kv_transfer_path `path`: own paths and transports."""
    own = [name for name in profile.get("paths", ()) if path in ("auto", name)]
    library = [*profile["transports"], *profile.get("same_host", ())] if path in ("auto", "backend") else []
    return list(dict.fromkeys([*own, *library]))


def path_problems(name: str, profile: Profile, path: str) -> list[Problem]:
    """Return what is wrong with kv_transfer_path `path` over the profile `name` (engine reference)."""
    own = list(profile.get("paths", ()))
    if unknown := [item for item in own if item not in OWN_PATHS]:
        return [
            Problem(
                f"kv_fabrics.{name}.paths", ", ".join(unknown), f"some of {', '.join(OWN_PATHS)}",
                "write the names of the reference engine's own paths; what UCX uses goes into transports",
            )
        ]  # fmt: skip
    if path not in OWN_PATHS or path in own:
        return []
    return [
        Problem(
            f"kv_transfer_path (kv_fabric is {name})", show(path),
            f"auto, backend or one of the paths that the profile promises ({', '.join(own) or 'none'})",
            "choose one of them, or another kv_fabric (tcp: stream; same_host: shared and cma)",
        )
    ]  # fmt: skip


def allowed(profile: Profile, engine: str = TRTLLM) -> tuple[str, ...] | None:
    """Return the transports that UCX_TLS admits, by the names UCX prints; None when it is not set (all of them)."""
    value = str(effective(profile, engine)["env"].get("UCX_TLS") or "")
    return expand([item.strip() for item in value.split(",")]) if value and not value.startswith("^") else None


def problems(
    name: str, profile: Profile, variables: Mapping[str, Any], *, engine: str, host: str = ""
) -> list[Problem]:
    """Return what is wrong with the profile `name` for `engine`, alone and on a host with `variables`.

    The profile must have the keys and types of `schema.FABRIC`.
    """
    engines = profile.get("engines", ("reference", TRTLLM))
    where = f"kv_fabric {name}" + (f" on {host}" if host else "")
    if engine not in engines:
        return [
            Problem(
                f"{where} (engine is {engine})", f"a profile for engine {' or '.join(engines)}",
                f"a profile for engine {engine}",
                "set kv_fabric: same_host or tcp" if engine == "reference" else
                "set kv_fabric: nvlink_single or pcie_single (one host), ib, roce or tcp (several)",
            )
        ]  # fmt: skip
    found = [*_environment(f"kv_fabrics.{name}", profile, engine)]
    return [*found, *_host(where, effective(profile, engine), variables)]


def worker_problems(what: str, env: Mapping[str, str]) -> list[Problem]:
    """Return what is wrong with the variables that a worker's entry (`what`) sets beside the fabric's."""
    return [*_variables(what, env), *_shared_threshold(what, env)]


def _variables(what: str, env: Mapping[str, str]) -> Iterator[Problem]:
    for key in env:
        if key.startswith("TRTLLM_USE_") and key.endswith(("_KVCACHE", "_KV_CACHE")):
            yield Problem(
                f"{what}.{key}", "a variable that chooses the KV backend", "nothing: the engine's YAML names it",
                "remove it and set kv_transfer_backend: ucx or nixl",
            )  # fmt: skip
        elif key in _LIBRARIES:
            yield Problem(
                f"{what}.{key}", "a path for libraries", "nothing: the image sets it for the matching copy of NIXL",
                "remove it; another copy ends in undefined symbols or \"backend 'UCX' not found\"",
            )  # fmt: skip


def _shared_threshold(what: str, env: Mapping[str, str]) -> Iterator[Problem]:
    if "UCX_RNDV_THRESH" in env:
        yield Problem(
            f"{what}.UCX_RNDV_THRESH", show(env["UCX_RNDV_THRESH"]), "nothing that both backends read",
            "set it in the profile's gpu.ucx_env: NIXL needs inf, which it sets itself unless it finds a value",
        )  # fmt: skip


def _environment(what: str, profile: Profile, engine: str) -> Iterator[Problem]:
    known = effective(profile, engine)
    env = known["env"]
    extra = {key: value for part in ("ucx_env", "nixl_env") for key, value in (known.get(part) or {}).items()}
    yield from _variables(f"{what}.env", {**env, **extra})
    if engine != TRTLLM:
        return
    yield from _shared_threshold(f"{what}.env", env)
    yield from _shared_threshold(f"{what}.gpu.nixl_env", known.get("nixl_env") or {})
    transports = [item.strip() for item in str(env.get("UCX_TLS") or "").split(",") if item.strip()]
    if not transports or transports[0].startswith("^"):
        return
    for transport in transports:
        if transport in _EXACT and not (transport.startswith("cuda") and "cuda" in transports):
            yield Problem(
                f"{what}.env.UCX_TLS", f"{transport}, the exact name of a transport", f"its alias, {_EXACT[transport]}",
                f"write {_EXACT[transport]}: the alias brings what the transport needs for wire-up and GPU memory",
            )  # fmt: skip
    names = expand(transports)
    if "cuda_copy" not in names and "all" not in transports:
        yield Problem(
            f"{what}.env.UCX_TLS", show(env["UCX_TLS"]), "cuda among the transports (engine is trtllm)",
            "add cuda: without it UCX takes GPU memory for host memory, and the worker dies or reads wrong bytes",
        )  # fmt: skip
    if "tcp" in transports and "tcp" not in known["transports"]:
        yield Problem(
            f"{what}.env.UCX_TLS", f"tcp, which transports ({', '.join(known['transports'])}) does not name",
            "no way for KV that the profile does not promise",
            "take tcp out of UCX_TLS (UCX would fall back to it without a word), or add it to transports knowingly",
        )  # fmt: skip
    missing = [item for item in known["transports"] if not set(expand([item])) & set(names) and "all" not in transports]
    if missing:
        yield Problem(
            f"{what}.transports", ", ".join(missing), f"transports that UCX_TLS ({env['UCX_TLS']}) admits",
            "add them to UCX_TLS, or take them out of transports",
        )  # fmt: skip
    if "cuda_ipc" in expand([*known["transports"], *known.get("same_host", ())]):
        split = [key for key in ("pid_mode", "ipc_mode") if known.get(key) != "host"]
        if split:
            yield Problem(
                f"{what}.{split[0]}", show(known.get(split[0])), "host, as the profile promises cuda_ipc",
                "set pid_mode: host and ipc_mode: host; UCX reads a process's GPU memory only within one namespace",
            )  # fmt: skip


def _host(where: str, known: Profile, variables: Mapping[str, Any]) -> Iterator[Problem]:
    if known.get("net_devices") != "rdma":
        return
    devices = list(variables.get("kv_net_devices") or ())
    if not devices:
        yield Problem(
            f"{where}: kv_net_devices", "nothing", "the host's RDMA devices with their port, for example [mlx5_0:1]",
            "set kv_net_devices for the host (`ls /sys/class/infiniband`; `nvidia-smi topo -m` says which is near)",
        )  # fmt: skip
    for device in devices:
        name, _, port = str(device).partition(":")
        if not name or not port.isdigit():
            yield Problem(
                f"{where}: kv_net_devices", show(device), "a device and its port, for example mlx5_0:1",
                "write the port behind the device: UCX knows RDMA devices by both",
            )  # fmt: skip
    rails = known["env"].get("UCX_MAX_RMA_RAILS")
    if devices and rails is not None and str(rails).isdigit() and int(rails) > 1 and len(devices) < 2:
        yield Problem(
            f"{where}: kv_net_devices", f"one device ({devices[0]})", "two or more: the profile uses several",
            "name the host's other RDMA devices too, or choose kv_fabric: ib",
        )  # fmt: skip
