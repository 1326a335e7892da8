from __future__ import annotations

from typing import Any

import pytest

from pdstack.deploy.packages import rdma, repository
from pdstack.deploy.packages.repository import PlanError

REPOSITORIES = {
    "doca": {
        "deb": {"uri": "https://rdma.example/doca/3.1.0/{id}{version}/{machine}", "suite": "./", "key": "https://rdma.example/key.pub"},
        "rpm": {"baseurl": "https://rdma.example/doca/3.1.0/{id}{major}/{machine}", "gpgkey": "https://rdma.example/key.pub"},
    }
}  # fmt: skip


def system(name: str, version: str, kernel: str = "6.8.0-45-generic") -> repository.System:
    return repository.system(
        {
            "distribution": name,
            "distribution_version": version,
            "architecture": "x86_64",
            "kernel": kernel,
            "pkg_mgr": "apt" if name in ("Debian", "Ubuntu") else "dnf",
        }
    )


@pytest.mark.parametrize(("name", "version"), [("Ubuntu", "22.04"), ("Ubuntu", "24.04"), ("Debian", "12.11")])
def test_inbox_on_debian_and_ubuntu(name: str, version: str) -> None:
    assert rdma.plan(system(name, version), "inbox", {}) == {
        "packages": [
            "rdma-core",
            "ibverbs-providers",
            "ibverbs-utils",
            "rdmacm-utils",
            "infiniband-diags",
            "perftest",
            "mstflint",
        ],
        "repository": None,
    }


@pytest.mark.parametrize("name", ["Rocky", "RedHat"])
def test_inbox_on_rhel(name: str) -> None:
    assert rdma.plan(system(name, "9.6"), "inbox", {})["packages"] == [
        "rdma-core",
        "libibverbs-utils",
        "librdmacm-utils",
        "infiniband-diags",
        "perftest",
        "mstflint",
    ]


def test_doca_with_the_headers_of_the_running_kernel() -> None:
    plan = rdma.plan(system("Ubuntu", "24.04"), "doca", REPOSITORIES)
    assert plan["packages"] == ["linux-headers-6.8.0-45-generic", "doca-ofed"]
    assert plan["repository"] is not None
    assert "URIs: https://rdma.example/doca/3.1.0/ubuntu24.04/x86_64\n" in plan["repository"]["file"]["content"]
    plan = rdma.plan(system("Rocky", "9.6", "5.14.0-570.el9.x86_64"), "doca", REPOSITORIES)
    assert plan["packages"] == ["kernel-devel-5.14.0-570.el9.x86_64", "doca-ofed"]
    assert plan["repository"] is not None
    assert "baseurl=https://rdma.example/doca/3.1.0/rhel9/x86_64\n" in plan["repository"]["file"]["content"]


@pytest.mark.parametrize(("stack", "told"), [("mofed", "found 'mofed'"), ("doca", "wanted its `deb` entry")])
def test_what_has_no_plan(stack: str, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        rdma.plan(system("Debian", "12"), stack, {})


@pytest.mark.parametrize(
    ("flavour", "kernel", "stack", "path"),
    [
        ("open", "6.1.0-37-amd64", "inbox", "dmabuf"),
        ("open", "5.14.0-570.el9.x86_64", "doca", "dmabuf"),
        ("open", "5.12.0", "inbox", "dmabuf"),
        ("open", "5.4.0-200-generic", "doca", "peermem"),
        ("open", "5.11.22", "inbox", "none"),
        ("proprietary", "6.8.0-45-generic", "doca", "peermem"),
        ("proprietary", "6.8.0-45-generic", "inbox", "none"),
    ],
)
def test_how_a_nic_reaches_gpu_memory(flavour: str, kernel: str, stack: str, path: str) -> None:
    found = rdma.gdr_path(flavour, kernel, stack)
    assert found["path"] == path
    assert kernel in found["reason"] or flavour in found["reason"]


def test_modules_of_the_host() -> None:
    assert rdma.modules(["mlx5_0:1"], "dmabuf") == ["mlx5_ib", "ib_uverbs", "rdma_ucm", "ib_umad"]
    assert rdma.modules([], "peermem") == ["ib_uverbs", "rdma_ucm", "ib_umad", "nvidia_peermem"]


@pytest.mark.parametrize(
    ("path", "loaded", "usable", "action"),
    [
        ("dmabuf", False, False, "keep"),
        ("dmabuf", True, True, "keep"),
        ("dmabuf", True, False, "unload"),
        ("peermem", False, False, "load"),
        ("peermem", True, True, "keep"),
    ],
)
def test_an_unusable_peermem_hides_dmabuf(path: str, loaded: bool, usable: bool, action: str) -> None:
    assert rdma.peermem_action(path, loaded, usable) == action


def wrong(**changed: Any) -> list[str]:
    known: dict[str, Any] = {
        "stack": "inbox",
        "path": rdma.gdr_path("open", "6.8.0", "inbox"),
        "ofed": "",
        "secure_boot": False,
    }
    return [f"{problem.what}: {problem.found}; {problem.fix}" for problem in rdma.problems(**known | changed)]


def test_nothing_is_in_the_way() -> None:
    assert wrong() == []
    assert wrong(stack="doca", ofed="OFED-internal-25.04-0.6.1:") == []
    assert wrong(secure_boot=True) == []


def test_an_old_ofed_is_refused() -> None:
    (problem,) = wrong(stack="doca", ofed="MLNX_OFED_LINUX-5.8-1.1.2.1:")
    assert "MLNX_OFED_LINUX-5.8-1.1.2.1 is installed" in problem
    assert "ofed_uninstall.sh" in problem


def test_inbox_beside_doca_is_refused() -> None:
    (problem,) = wrong(ofed="OFED-internal-25.04-0.6.1:")
    assert "rdma__stack: doca" in problem


def test_unsigned_modules_under_secure_boot_are_refused() -> None:
    assert len(wrong(stack="doca", secure_boot=True)) == 1


def test_no_way_to_gpu_memory_is_refused() -> None:
    (problem,) = wrong(path=rdma.gdr_path("proprietary", "6.8.0", "inbox"))
    assert "kv_fabric: tcp" in problem


def test_when_the_modules_want_a_reboot() -> None:
    assert rdma.reboot_reason("25.04-0.6.1", "25.04-0.6.1") == ""
    assert rdma.reboot_reason("", "25.04-0.6.1") == ""
    assert "6.8.0 is loaded" in rdma.reboot_reason("6.8.0", "25.04-0.6.1")
