"""GDRCopy: its packages, and whether its kernel module can be built for this kernel and driver at all."""

from __future__ import annotations

from typing import TypedDict

from pdstack.deploy.packages import repository
from pdstack.deploy.packages.engine import upstream
from pdstack.deploy.packages.repository import PlanError, System
from pdstack.deploy.problem import Problem

PACKAGES = {
    "deb": ("gdrdrv-dkms", "libgdrapi", "gdrcopy-tests", "gdrcopy"),
    "rpm": ("gdrcopy-kmod", "gdrcopy", "gdrcopy-devel"),
}
# First release for CUDA 13, and the first whose module builds on a kernel of 6.15 or later.
CUDA_13 = "2.5.1"
KERNEL_6_15 = "2.5.2"


class Plan(TypedDict):
    """Packages with their version, and the same without."""

    packages: list[str]
    names: list[str]


def plan(host: System, version: str) -> Plan:
    """Return the packages of `version` (empty: the newest known to the host)."""
    names = PACKAGES[repository.package_format(host)]
    if version and not upstream(version):
        raise PlanError(f"gdrcopy__version: found {version!r}, wanted a package version such as 2.5.2-1. Correct it")
    return {"packages": repository.versioned(names, version, host), "names": list(names)}


def problems(*, version: str, kernel: str, source: bool, secure_boot: bool | None) -> list[Problem]:
    """Return why gdrdrv cannot be built or loaded; `source` is whether the driver's is there (/usr/src/nvidia-*)."""
    found = []
    if not source:
        found.append(
            Problem(
                "GDRCopy",
                "no driver source in /usr/src/nvidia-*",
                "the driver's DKMS package: gdrdrv is built against it",
                "install the driver by DKMS (not prebuilt linux-modules-nvidia), or set gdrcopy__manage: false",
            )
        )
    needed = max(CUDA_13, KERNEL_6_15 if upstream(kernel) >= (6, 15) else "", key=upstream)
    if version and upstream(version) < upstream(needed):
        found.append(
            Problem(
                f"GDRCopy {version}",
                f"kernel {kernel}, CUDA 13",
                f"GDRCopy {needed} or later",
                "set gdrcopy__version to it, or gdrcopy__manage: false",
            )
        )
    if secure_boot:
        found.append(
            Problem(
                "GDRCopy",
                "Secure Boot is on",
                "off: gdrdrv is not signed",
                "set gdrcopy__manage: false, or enroll the DKMS key at the console",
            )
        )
    return found
