"""What UCX and NIXL say on a GPU host, before any worker runs there, judged by what the fabric's profile promises."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pdstack.deploy import fabrics, ucx_log
from pdstack.deploy.problem import Problem, show

_TRANSPORT = re.compile(r"transports? ((?:'[^']+',?)+) (?:is|are) not available")
# A host without a GPU (of a laboratory) cannot have these; where GPUs are real, their absence is an error.
_OF_GPUS = {"cuda", "cuda_copy", "cuda_ipc", "gdr_copy"}
_FIXES = (
    ("unused environment variable", "correct the spelling in the profile's env: UCX ignores what it does not know"),
    ("network device", "name devices that are there in kv_net_devices (`ls /sys/class/infiniband`) or kv_interface"),
    (
        "no usable transports",
        "bring up what the profile needs (roles rdma and gpu_driver), or choose another kv_fabric",
    ),
    ("'rc'", "bring up RDMA: `ibv_devinfo` must list an active port (role rdma)"),
    ("cuda", "`nvidia-smi -L` must list the GPUs; run the role gpu_driver, or reboot if it asks for that"),
    ("GPUDirect", "load nvidia_peermem or use the open driver with DMA-BUF (role rdma says which), or kv_fabric: tcp"),
    ("memlock", "raise the limit (role host_tuning)"),
)


def versions_differ(what: str, found: str, wanted: str) -> list[Problem]:
    """Return a problem when a host's tools are of another version than the runtime image."""
    if found == wanted:
        return []
    return [
        Problem(
            what, show(found), f"{wanted}, as in the runtime image",
            "change versions.wheels and versions.trtllm_runtime together: a check with another version proves nothing",
        )
    ]  # fmt: skip


def ucx(
    profile: Mapping[str, Any], said: Mapping[str, str], *, host: str, name: str, version: str, gpu: bool
) -> list[Problem]:
    """Return what is wrong on `host`; `said` is what ucx_info prints for -v (version), -d (devices), -u r -w (worker).

    `gpu` false: a host whose GPUs are not real, which cannot show GPU transports.
    """
    where = f"UCX on {host} (kv_fabric {name})"
    found = versions_differ(f"{where}: version", ucx_log.version(said["version"]), version)
    if found:
        return found
    known = fabrics.effective(profile, fabrics.TRTLLM)
    there = ucx_log.devices(said["devices"])
    wanted = fabrics.promised(profile, same_host=False)
    if not set(wanted) & set(there) and not (not gpu and set(wanted) <= _OF_GPUS):
        found.append(
            Problem(
                f"{where}: transports",
                ", ".join(there) or "none",
                f"one of {', '.join(wanted)}",
                "bring up what the profile needs (roles rdma and gpu_driver), or choose another kv_fabric",
            )
        )
    if gpu and "cuda_copy" not in there:
        found.append(
            Problem(
                f"{where}: GPU memory",
                f"{', '.join(there) or 'no transport'}",
                "cuda_copy among the transports",
                "`nvidia-smi -L` must list the GPUs; run the role gpu_driver, or reboot if it asks for that",
            )
        )
    found += _complaints(where, said["worker"], gpu=gpu, rdma=bool({"rc_mlx5", "rc_verbs"} & set(there)), known=known)
    return found


def _complaints(where: str, text: str, *, gpu: bool, rdma: bool, known: Mapping[str, Any]) -> Iterator[Problem]:
    for line in ucx_log.complaints(text):
        if line.startswith("(set UCX_WARN_UNUSED_ENV_VARS"):
            continue
        if not gpu and _of_missing_gpus(line):
            continue
        if not rdma and _only_of("UCX_IB_", line):
            # Of a transport whose absence is told already.
            continue
        fix = next((fix for key, fix in _FIXES if key in line), "run `ucx_info -u r -w` with the profile's env by hand")
        yield Problem(
            f"{where}: its environment", line, "no warning and no error of UCX", f"{fix} (env: {_shown(known['env'])})"
        )


def _of_missing_gpus(line: str) -> bool:
    if match := _TRANSPORT.search(line):
        return set(re.findall(r"'([^']+)'", match[1])) <= _OF_GPUS
    if line.startswith("unused environment variable"):
        # Options of GPU transports are read when there is a GPU.
        return _only_of("UCX_CUDA_", line)
    return False


def _only_of(prefix: str, line: str) -> bool:
    names = re.findall(r"UCX_[A-Z0-9_]+", line)
    return line.startswith("unused environment variable") and all(name.startswith(prefix) for name in names)


def _shown(env: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in env.items())


def nixl(said: Mapping[str, Any], *, host: str, version: str, ucx_version: str, gpu: bool) -> list[Problem]:
    """Return what is wrong with NIXL on `host`.

    `said` is what files/look.py of the role nixl prints: the version of NIXL (version), of its UCX (ucx), its plugins,
    and why the UCX plugin does not load (plugin: nothing when it does).
    """
    where = f"NIXL on {host}"
    found = versions_differ(f"{where}: version", said["version"], version)
    found += versions_differ(f"{where}: version of its UCX", said["ucx"], ucx_version)
    error = str(said["plugin"])
    if error and not (not gpu and "libcuda.so.1" in error):
        found.append(
            Problem(
                f"{where}: its UCX plugin",
                error,
                "a plugin that loads",
                "libcuda.so.1 comes with the driver (role gpu_driver), libibverbs.so.1 and libmlx5.so.1 with rdma-core "
                "(role rdma)",
            )
        )
    return found
