from __future__ import annotations

from typing import Any

import pytest

from pdstack.deploy.packages import gdrcopy, repository
from pdstack.deploy.packages.repository import PlanError


def system(name: str, version: str) -> repository.System:
    return repository.system({"distribution": name, "distribution_version": version, "architecture": "x86_64"})


@pytest.mark.parametrize(("name", "version"), [("Ubuntu", "22.04"), ("Ubuntu", "24.04"), ("Debian", "12.11")])
def test_on_debian_and_ubuntu(name: str, version: str) -> None:
    assert gdrcopy.plan(system(name, version), "2.5.2-1")["packages"] == [
        "gdrdrv-dkms=2.5.2-1",
        "libgdrapi=2.5.2-1",
        "gdrcopy-tests=2.5.2-1",
        "gdrcopy=2.5.2-1",
    ]


@pytest.mark.parametrize("name", ["Rocky", "RedHat"])
def test_on_rhel(name: str) -> None:
    assert gdrcopy.plan(system(name, "9.6"), "")["packages"] == ["gdrcopy-kmod", "gdrcopy", "gdrcopy-devel"]


def test_a_version_that_is_none() -> None:
    with pytest.raises(PlanError, match="found 'newest'"):
        gdrcopy.plan(system("Debian", "12"), "newest")


def wrong(**changed: Any) -> list[str]:
    known: dict[str, Any] = {
        "version": "2.5.1-1",
        "kernel": "6.8.0-45-generic",
        "source": True,
        "secure_boot": False,
    }
    return [f"{problem.what}: {problem.found}; {problem.wanted}" for problem in gdrcopy.problems(**known | changed)]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"source": False}, "no driver source in /usr/src/nvidia-*"),
        ({"version": "2.4.4-1"}, "GDRCopy 2.5.1 or later"),
        ({"kernel": "6.15.3"}, "GDRCopy 2.5.2 or later"),
        ({"secure_boot": True}, "Secure Boot is on"),
    ],
)
def test_why_it_cannot_work(changed: dict[str, Any], told: str) -> None:
    (problem,) = wrong(**changed)
    assert told in problem


def test_where_it_works() -> None:
    assert wrong() == []
    assert wrong(version="") == []
    assert wrong(version="2.5.2-1", kernel="6.15.3", secure_boot=None) == []
