"""The NVIDIA Container Toolkit: packages, repository, earlier set-ups in the way, and how containers get GPUs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from pdstack.deploy.packages import repository
from pdstack.deploy.packages.engine import upstream
from pdstack.deploy.packages.repository import PlanError, Repository, System
from pdstack.deploy.problem import Problem

NAME = "nvidia-container-toolkit"
# One version on all four: with different ones the runtime and its library do not understand each other.
PACKAGES = (NAME, f"{NAME}-base", "libnvidia-container-tools", "libnvidia-container1")
# Files that NVIDIA's instructions of the years have put there. Beside ours they give apt's "Conflicting values set for
# option Signed-By", or a second version of the same packages.
EARLIER = (
    "libnvidia-container.list", "libnvidia-container-experimental.list", "nvidia-docker.list",
    "nvidia-container-runtime.list", f"{NAME}.list",
    "libnvidia-container.repo", "nvidia-docker.repo", "nvidia-container-runtime.repo",
)  # fmt: skip
SAME = re.compile(r"libnvidia-container|nvidia-docker|nvidia-container-(?:runtime|toolkit)")
# The release that brought nvidia-cdi-refresh.service, which keeps /var/run/cdi/nvidia.yaml.
REFRESH_SINCE = (1, 18)
REQUESTS = ("auto", "cdi", "runtime")
RUNTIME = {"runtimes": {"nvidia": {"path": "nvidia-container-runtime", "args": []}}}


class Plan(TypedDict):
    """What to install: `packages` with their version, `pins` (apt preferences; empty: none), whether CDI refreshes."""

    packages: list[str]
    names: list[str]
    repository: Repository
    pins: repository.File
    refreshes: bool


class Mode(TypedDict):
    """How containers get GPUs (cdi or runtime), and why."""

    mode: str
    reason: str


class Sources(TypedDict):
    """Files of earlier set-ups to remove, and those that a person has to mend."""

    remove: list[str]
    problems: list[Problem]


def plan(host: System, version: str, repositories: Mapping[str, Any]) -> Plan:
    """Return the plan for `version` (X-1) on `host`; `repositories` is the inventory's gpu_repositories."""
    if not re.fullmatch(r"\d+\.\d+\.\d+-\d+", version):
        raise PlanError(
            f"versions.gpu.toolkit: found {version!r}, wanted a package version such as 1.20.0-1. Correct it"
        )
    deb = repository.package_format(host) == "deb"
    pins = repository.File(path=f"/etc/apt/preferences.d/{NAME}", content=repository.preferences(PACKAGES, version))
    return {
        "packages": repository.versioned(PACKAGES, version, host),
        "names": list(PACKAGES),
        "repository": repository.repository(NAME, repositories.get("toolkit", {}), host),
        "pins": pins if deb else {"path": "", "content": ""},
        "refreshes": upstream(version) >= REFRESH_SINCE,
    }


def sources(files: Mapping[str, str], ours: str) -> Sources:
    """Return what of the package manager's source files (path -> text) is in the way of the file `ours`."""
    remove, problems = [], []
    for path, text in sorted(files.items()):
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        if path == ours or not any(SAME.search(line) for line in lines):
            continue
        if path.rpartition("/")[2] in EARLIER:
            remove.append(path)
        else:
            problems.append(
                Problem(
                    f"package source {path}",
                    next(line for line in lines if SAME.search(line)).strip(),
                    f"the toolkit's repository in {ours} alone (two entries give conflicting values for Signed-By)",
                    f"take that line out of {path}",
                )
            )
    return {"remove": remove, "problems": problems}


def daemon_settings(mode: str) -> dict[str, Any]:
    """Return what belongs into daemon.json: the runtime always, the feature where containers ask for CDI devices."""
    return {**RUNTIME, **({"features": {"cdi": True}} if mode == "cdi" else {})}


def gpu_mode(request: str, docker: str, cdi_since: str) -> Mode:
    """Return how containers get GPUs on an engine of version `docker`; PlanError when the request cannot be met."""
    if request not in REQUESTS:
        raise PlanError(f"gpu_request: found {request!r}, wanted one of {', '.join(REQUESTS)}. Set one of them")
    able = bool(docker) and upstream(docker) >= upstream(cdi_since)
    found = f"Docker {docker}" if docker else "no version of Docker"
    if request == "cdi" and not able:
        raise PlanError(
            f"gpu_request cdi: found {found}, wanted Docker {cdi_since} or later. Upgrade Docker "
            "(container_engine__source: docker), or set gpu_request: auto"
        )
    if request == "runtime":
        return {"mode": "runtime", "reason": "gpu_request is runtime"}
    return {"mode": "cdi" if able else "runtime", "reason": f"{found}, CDI wants {cdi_since}"}


def cdi_stale(spec: str, listed: Sequence[str], driver: str, gpus: int) -> str:
    """Return why the CDI specification has to be made anew; empty when it fits.

    `spec` is the text of the file, `listed` the devices of `nvidia-ctk cdi list`, `driver` the loaded driver's version
    (empty: not known) and `gpus` how many GPUs it drives.
    """
    if "nvidia.com/gpu=all" not in listed:
        return "nvidia.com/gpu=all is not listed"
    numbered = sum(1 for name in listed if re.fullmatch(r"nvidia\.com/gpu=\d+", name))
    if gpus and numbered != gpus:
        return f"{numbered} GPUs are listed, the driver has {gpus}"
    libraries = set(re.findall(r"\.so\.(\d{3}\.\d+(?:\.\d+)?)\b", spec))
    if driver and libraries - {driver}:
        return f"it names libraries of driver {', '.join(sorted(libraries - {driver}))}, loaded is {driver}"
    return ""


def security(options: Sequence[str], devices_allowed: str) -> list[Problem]:
    """Return what in the engine's SecurityOptions keeps containers from GPUs.

    `devices_allowed` is the text of SELinux' boolean container_use_devices (empty: there is none).
    """
    names = [option.removeprefix("name=").split(",")[0] for option in options]
    found = []
    if "rootless" in names:
        found.append(
            Problem(
                "Docker without root",
                "a rootless engine",
                "an engine that runs as root: RDMA needs locked memory",
                "stop it (systemctl --user stop docker) and let container_engine bring up the system's engine",
            )
        )
    if "selinux" in names and not devices_allowed.startswith("1"):
        found.append(
            Problem(
                "SELinux for containers",
                "container_use_devices is off",
                "on: containers open /dev/nvidia*",
                "setsebool -P container_use_devices on",
            )
        )
    return found
