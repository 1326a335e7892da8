"""The RDMA stack of a host: packages, how the NIC reads GPU memory (DMA-BUF or nvidia_peermem), kernel modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from pdstack.deploy.packages import repository
from pdstack.deploy.packages.engine import upstream
from pdstack.deploy.packages.repository import PlanError, Repository, System
from pdstack.deploy.problem import Problem

STACKS = ("inbox", "doca")
NAME = "doca"
INBOX = {
    "deb": (
        "rdma-core",
        "ibverbs-providers",
        "ibverbs-utils",
        "rdmacm-utils",
        "infiniband-diags",
        "perftest",
        "mstflint",
    ),
    "rpm": ("rdma-core", "libibverbs-utils", "librdmacm-utils", "infiniband-diags", "perftest", "mstflint"),
}
# DOCA builds its modules for the running kernel.
HEADERS = {"deb": "linux-headers-{kernel}", "rpm": "kernel-devel-{kernel}"}
# The kernel's dma-buf importer in RDMA, and what uses it, came with this release.
DMABUF_KERNEL = "5.12"
PEERMEM = "nvidia_peermem"
MODULES = ("ib_uverbs", "rdma_ucm", "ib_umad")


class Plan(TypedDict):
    """What to install, and DOCA's repository (None for the inbox stack)."""

    packages: list[str]
    repository: Repository | None


class Path(TypedDict):
    """How a NIC reaches GPU memory: dmabuf, peermem or none; and why."""

    path: str
    reason: str


def plan(host: System, stack: str, repositories: Mapping[str, Any]) -> Plan:
    """Return the packages of `stack` on `host`; PlanError for a stack that does not exist or has no repository."""
    if stack not in STACKS:
        raise PlanError(f"rdma__stack: found {stack!r}, wanted one of {', '.join(STACKS)}. Set one of them")
    kind = repository.package_format(host)
    if stack == "inbox":
        return {"packages": list(INBOX[kind]), "repository": None}
    return {
        "packages": [HEADERS[kind].format(kernel=host["kernel"]), "doca-ofed"],
        "repository": repository.repository(NAME, repositories.get("doca", {}), host),
    }


def gdr_path(flavour: str, kernel: str, stack: str) -> Path:
    """Return how NICs read GPU memory with a driver of `flavour` (open, proprietary) on `kernel` (uname -r).

    DMA-BUF needs nothing but open modules and a kernel; nvidia_peermem exists only against the symbols of OFED.
    """
    recent = upstream(kernel) >= upstream(DMABUF_KERNEL)
    if flavour == "open" and recent:
        return {"path": "dmabuf", "reason": f"open kernel modules and kernel {kernel} (DMA-BUF since {DMABUF_KERNEL})"}
    lacking = f"kernel {kernel} is older than {DMABUF_KERNEL}" if flavour == "open" else f"{flavour} kernel modules"
    if stack == "doca":
        return {"path": "peermem", "reason": f"{lacking}: no DMA-BUF; DOCA carries the symbols that {PEERMEM} needs"}
    return {"path": "none", "reason": f"{lacking}: no DMA-BUF; and {PEERMEM} needs DOCA"}


def modules(net_devices: Sequence[str], path: str) -> list[str]:
    """Return the kernel modules that the host loads at boot."""
    driver = ["mlx5_ib"] if any(name.startswith("mlx5_") for name in net_devices) else []
    return [*driver, *MODULES, *([PEERMEM] if path == "peermem" else [])]


def peermem_action(path: str, loaded: bool, usable: bool) -> str:
    """Return load, unload or keep: a module that is loaded and unusable hides DMA-BUF from UCX."""
    if path == "peermem":
        return "keep" if loaded else "load"
    return "unload" if loaded and not usable else "keep"


def problems(*, stack: str, path: Path, ofed: str, secure_boot: bool | None) -> list[Problem]:
    """Return what stands in the way of `stack`. `ofed` is what `ofed_info -s` says, empty without OFED."""
    found = []
    # DOCA's own says OFED-internal-...; the standalone MLNX_OFED before it said its name.
    old = ofed.startswith("MLNX_OFED")
    if old or (stack == "inbox" and ofed):
        fix = "remove it (/usr/sbin/ofed_uninstall.sh --force) and reboot"
        found.append(
            Problem(
                f"RDMA stack {stack}",
                f"{ofed.rstrip(':')} is installed",
                "no other OFED" if stack == "doca" else "the distribution's own RDMA stack",
                fix if stack == "doca" or old else f"{fix}, or set rdma__stack: doca",
            )
        )
    if stack == "doca" and secure_boot:
        found.append(
            Problem(
                "RDMA stack doca",
                "Secure Boot is on",
                "off, or inbox: the firmware refuses DOCA's unsigned modules",
                "set rdma__stack: inbox (its modules are signed), or turn Secure Boot off",
            )
        )
    if path["path"] == "none":
        found.append(
            Problem(
                "GPU memory over RDMA",
                path["reason"],
                "DMA-BUF or nvidia_peermem",
                "gpu_driver with open modules on a kernel of 5.12 or later, or rdma__stack: doca, or kv_fabric: tcp",
            )
        )
    return found


def reboot_reason(loaded: str, on_disk: str) -> str:
    """Return why the host has to boot for its RDMA modules; empty when it need not.

    Restarting openibd instead would take every network path of the NICs down, Ansible's own among them.
    """
    if loaded and on_disk and loaded != on_disk:
        return f"mlx5_core {loaded} is loaded, {on_disk} is installed"
    return ""
