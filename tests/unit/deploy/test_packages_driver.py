from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdstack.deploy.packages import driver, repository
from pdstack.deploy.packages.repository import PlanError

COMMON = Path(__file__).resolve().parents[3] / "inventories/common/group_vars/all"
REPOSITORIES = yaml.safe_load((COMMON / "gpu.yml").read_text())["gpu_repositories"]
SYSTEMS = {
    "ubuntu-22.04": ("ubuntu", "22.04", "jammy", "6.8.0-45-generic"),
    "ubuntu-24.04": ("ubuntu", "24.04", "noble", "6.8.0-1015-aws"),
    "debian-12": ("debian", "12", "bookworm", "6.1.0-28-amd64"),
    "rocky-9": ("rocky", "9.6", "", "5.14.0-570.12.1.el9_6.x86_64"),
    "rhel-9": ("rhel", "9.4", "", "5.14.0-427.13.1.el9_4.x86_64"),
}
CUDA_SOURCE = "/etc/apt/sources.list.d/cuda-debian12-x86_64.list: deb https://packages.example/cuda/repos/debian12 /"
EPEL_SOURCE = "/etc/yum.repos.d/epel.repo: metalink=https://mirrors.example/epel"
# Golden lists: distribution and branch -> what is asked of the package manager, in its words.
GOLDEN = {
    ("ubuntu-22.04", "580.105.08"): [
        "libnvidia-compute-580=580.105.08-*", "nvidia-utils-580=580.105.08-*", "nvidia-dkms-580-open=580.105.08-*",
        "nvidia-compute-utils-580=580.105.08-*", "nvidia-fabricmanager-580=580.105.08-*",
    ],
    ("ubuntu-24.04", "580.105.08"): [
        "libnvidia-compute-580=580.105.08-*", "nvidia-utils-580=580.105.08-*", "nvidia-dkms-580-open=580.105.08-*",
        "nvidia-compute-utils-580=580.105.08-*", "nvidia-fabricmanager-580=580.105.08-*",
    ],
    ("ubuntu-24.04", "590.44.01"): [
        "libnvidia-compute=590.44.01-*", "nvidia-utils=590.44.01-*", "nvidia-dkms-open=590.44.01-*",
        "nvidia-persistenced=590.44.01-*", "nvidia-fabricmanager=590.44.01-*",
    ],
    ("debian-12", "580.105.08"): [
        "nvidia-driver-cuda=580.105.08-*", "nvidia-kernel-open-dkms=580.105.08-*", "nvidia-persistenced=580.105.08-*",
        "nvidia-fabricmanager-580=580.105.08-*",
    ],
    ("debian-12", "590.44.01"): [
        "nvidia-driver-cuda=590.44.01-*", "nvidia-kernel-open-dkms=590.44.01-*", "nvidia-persistenced=590.44.01-*",
        "nvidia-fabricmanager=590.44.01-*",
    ],
    ("rocky-9", "580.105.08"): [
        "nvidia-driver-cuda-580.105.08", "kmod-nvidia-open-dkms-580.105.08", "nvidia-persistenced-580.105.08",
        "nvidia-fabricmanager-580.105.08",
    ],
    ("rhel-9", "590.44.01"): [
        "nvidia-driver-cuda-590.44.01", "kmod-nvidia-open-dkms-590.44.01", "nvidia-persistenced-590.44.01",
        "nvidia-fabricmanager-590.44.01",
    ],
}  # fmt: skip
HEADERS = {
    "ubuntu-22.04": ["linux-headers-6.8.0-45-generic"],
    "ubuntu-24.04": ["linux-headers-6.8.0-1015-aws"],
    "debian-12": ["linux-headers-6.1.0-28-amd64"],
    "rocky-9": ["kernel-devel-5.14.0-570.12.1.el9_6.x86_64", "kernel-headers-5.14.0-570.12.1.el9_6"],
    "rhel-9": ["kernel-devel-5.14.0-427.13.1.el9_4.x86_64", "kernel-headers-5.14.0-427.13.1.el9_4"],
}


def facts(name: str = "debian-12", **changed: Any) -> dict[str, Any]:
    """Return what the probe says of a bare host with two GPUs; `driver`, `packages` and `os` change single keys."""
    kind, version, codename, kernel = SYSTEMS[name]
    found: dict[str, Any] = {
        "os": {"id": kind, "version": version, "codename": codename, "arch": "x86_64", "kernel": kernel, "dgx": False},
        "pci": {"gpus": [{}, {}], "nvswitches": [], "nics": []},
        "driver": {
            "loaded": None, "on_disk": None, "library": None, "flavour": "", "nouveau": False, "secure_boot": False,
            "key_enrolled": None, "headers": False, "nvidia_smi": {"rc": None, "text": "", "gpus": []},
        },
        "packages": {
            "manager": "dnf" if name.startswith("r") else "apt", "installed": {}, "holds": [], "module_stream": "",
            "run_file_install": False, "pin_file": False,
            "sources": [EPEL_SOURCE] if name.startswith("r") else [],
        },
        "fabric_manager": {"unit": "", "version": None, "state": "", "status": ""},
    }  # fmt: skip
    for key, value in changed.items():
        found[key] = {**found[key], **value}
    return found


def plan(name: str = "debian-12", version: str = "580.105.08", **changed: Any) -> driver.Plan:
    wanted = {"branch": version.split(".")[0], "version": version, "minimum": "580.65.06"} | changed
    return driver.plan(driver.system(facts(name)), repositories=REPOSITORIES, **wanted)


def serving(version: str = "580.105.08", **changed: Any) -> dict[str, Any]:
    """Return a host on which `version` runs."""
    whole = {"loaded": version, "on_disk": version, "library": version, "flavour": "open"}
    smi = {"nvidia_smi": {"rc": 0, "text": "", "gpus": [{}, {}]}}
    return facts(driver=whole | smi | changed)


def whats(found: list[Any]) -> list[str]:
    return [problem.what for problem in found]


@pytest.mark.parametrize(("name", "version"), list(GOLDEN))
def test_packages_of_a_host_with_switches(name: str, version: str) -> None:
    assert plan(name, version, nvswitches=4)["packages"] == GOLDEN[name, version]
    assert plan(name, version)["packages"] == GOLDEN[name, version][:-1]


@pytest.mark.parametrize("name", list(HEADERS))
def test_headers_are_those_of_the_kernel_that_runs(name: str) -> None:
    assert plan(name)["headers"] == HEADERS[name]


def test_all_of_ubuntus_own_modules_are_signed_and_need_no_compiler() -> None:
    found = plan("ubuntu-24.04", source="distribution", nvswitches=1)
    assert found["packages"] == [
        "nvidia-headless-no-dkms-580-server-open", "libnvidia-compute-580-server", "nvidia-utils-580-server",
        "nvidia-compute-utils-580-server", "linux-modules-nvidia-580-server-open-6.8.0-1015-aws",
        "linux-modules-nvidia-580-server-open-aws", "nvidia-fabricmanager-580",
    ]  # fmt: skip
    assert found["headers"] == []
    assert (found["keyring"], found["repository"], found["version"]) == (None, None, "")
    assert "Pin: version 580.*\n" in found["pin"]["content"]


@pytest.mark.parametrize(
    ("name", "flavour", "profile", "names"),
    [
        ("debian-12", "proprietary", "compute", ["nvidia-driver-cuda", "nvidia-kernel-dkms", "nvidia-persistenced"]),
        ("debian-12", "open", "full", ["nvidia-open", "nvidia-persistenced"]),
        ("rocky-9", "proprietary", "compute", ["nvidia-driver-cuda", "kmod-nvidia-latest-dkms", "nvidia-persistenced"]),
        ("ubuntu-24.04", "proprietary", "full", ["cuda-drivers", "nvidia-persistenced"]),
    ],
)
def test_other_flavours_and_profiles(name: str, flavour: str, profile: str, names: list[str]) -> None:
    assert plan(name, flavour=flavour, profile=profile)["names"] == names


def test_nvlink5_has_a_subnet_manager_with_versions_of_its_own() -> None:
    found = plan(nvswitches=2, nvlink5=True)
    assert found["fabric_manager"] == ["nvidia-fabricmanager-580", "nvlsm"]
    assert found["packages"][-1] == "nvlsm"
    assert found["modules"] == ["ib_umad"]


def test_names_can_be_given() -> None:
    assert plan(packages=["a", "b"])["packages"] == ["a=580.105.08-*", "b=580.105.08-*"]


def test_the_keyring_comes_out_of_the_repository_of_the_release() -> None:
    base = "https://developer.download.nvidia.com/compute/cuda/repos"
    for name, place in (("ubuntu-22.04", "ubuntu2204"), ("ubuntu-24.04", "ubuntu2404"), ("debian-12", "debian12")):
        keyring = plan(name)["keyring"]
        assert keyring is not None
        assert keyring["url"] == f"{base}/{place}/x86_64/cuda-keyring_1.1-1_all.deb"
    host = {**driver.system(facts("ubuntu-24.04")), "machine": "aarch64"}
    arm = driver.plan(
        repository.System(**host), branch="580", version="580.105.08", minimum="580.65.06", repositories=REPOSITORIES
    )
    assert arm["keyring"] is not None
    assert "/ubuntu2404/sbsa/" in arm["keyring"]["url"]


def test_a_mirror_has_a_key_and_a_source_list_of_ours() -> None:
    mirror = {
        "cuda": {"deb": {"uri": "http://mirror/{directory}/{platform}/", "suite": "/", "key": "http://mirror/key"}}
    }
    found = driver.plan(
        driver.system(facts()), branch="580", version="580.105.08", minimum="580.65.06", repositories=mirror
    )
    assert found["keyring"] is None
    assert found["repository"] is not None
    assert "URIs: http://mirror/debian12/x86_64/\n" in found["repository"]["file"]["content"]


def test_on_rhel_a_repository_file_and_a_module_stream() -> None:
    found = plan("rocky-9")
    assert found["repository"] is not None
    assert (
        "baseurl=https://developer.download.nvidia.com/compute/cuda/repos/rhel9/x86_64\n"
        in (found["repository"]["file"]["content"])
    )
    assert found["stream"] == "580-open"
    assert plan("rocky-9", flavour="proprietary")["stream"] == "580-dkms"
    assert found["pin"]["content"] == ""
    assert found["initramfs"][0] == "dracut"


def test_a_stream_is_reset_before_another_is_enabled() -> None:
    enable = ["dnf", "--assumeyes", "module", "enable", "nvidia-driver:580-open"]
    assert driver.stream_steps("580-open", "") == [enable]
    assert driver.stream_steps("580-open", "570-open")[0][3:] == ["reset", "nvidia-driver"]
    assert driver.stream_steps("580-open", "570-open")[1] == enable
    assert driver.stream_steps("580-open", "580-open") == []
    assert driver.stream_steps("", "") == []


def test_the_pin_holds_every_part_on_the_version_and_lets_it_go_back() -> None:
    pin = plan()["pin"]
    assert "Package: *nvidia* libcuda*" in pin["content"]
    assert "Pin: version 580.105.08-*\nPin-Priority: 1002\n" in pin["content"]
    # apt takes the first record that fits: ours has to come before the one of nvidia-driver-pinning-580.
    assert pin["path"].rpartition("/")[2] < "nvidia-driver-pinning-580"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"branch": "570"}, "wanted a release of branch 570"),
        ({"version": "580.65.05"}, "wanted 580.65.06 or later"),
        ({"version": "latest"}, "such as 580.105.08"),
        ({"source": "runfile"}, "gpu_driver__source: found 'runfile'"),
        ({"flavour": "nouveau"}, "gpu_driver__flavour"),
        ({"profile": "desktop"}, "gpu_driver__profile"),
        ({"source": "distribution"}, "whose own archive has no driver"),
    ],
)
def test_what_cannot_be_planned(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan(**changed)


@pytest.mark.parametrize(("kind", "version"), [("debian", "13"), ("ubuntu", "20.04"), ("arch", "1"), ("rhel", "8.9")])
def test_a_release_without_a_repository_is_told(kind: str, version: str) -> None:
    host = driver.system(facts(os={"id": kind, "version": version}))
    with pytest.raises(PlanError, match="set"):
        driver.plan(host, branch="580", version="580.105.08", minimum="580.65.06", repositories=REPOSITORIES)


def test_nothing_is_in_the_way_on_a_bare_host() -> None:
    for name in SYSTEMS:
        assert driver.refusals(plan(name), facts(name)) == []


def test_dgx_os_keeps_its_own_driver() -> None:
    found = driver.refusals(plan(), facts(os={"dgx": True}))
    assert whats(found) == ["operating system"]
    assert "gpu_driver__manage: false" in found[0].fix


def test_leftovers_of_debians_own_archive_are_refused_or_purged() -> None:
    installed = {
        "nvidia-driver": "535.261.03-1~deb12u1", "nvidia-alternative": "535.261.03-1~deb12u1",
        "glx-alternative-nvidia": "1.2.2", "libnvidia-ml1": "535.261.03-1~deb12u1",
        "nvidia-container-toolkit": "1.20.0-1", "libnvidia-container1": "1.20.0-1", "docker-ce": "5:27",
    }  # fmt: skip
    seen = facts(packages={"installed": installed, "sources": [CUDA_SOURCE]})
    others = ["glx-alternative-nvidia", "libnvidia-ml1", "nvidia-alternative", "nvidia-driver"]
    assert driver.leftovers(plan(), seen) == others
    found = driver.refusals(plan(), seen)
    assert whats(found) == ["driver packages of another source"]
    assert f"apt-get purge {' '.join(others)}" in found[0].fix
    assert driver.refusals(plan(), seen, purge=True) == []


def test_one_leftover_does_not_take_the_driver_with_it() -> None:
    installed = {"nvidia-driver-cuda": "580.95.05-1", "nvidia-alternative": "535.261.03-1~deb12u1"}
    assert driver.leftovers(plan(), facts(packages={"installed": installed, "sources": [CUDA_SOURCE]})) == [
        "nvidia-alternative"
    ]


def test_a_driver_without_the_cuda_repository_came_from_elsewhere() -> None:
    installed = {"nvidia-driver": "535.183.01-1", "nvidia-container-toolkit": "1.20.0-1"}
    assert driver.leftovers(plan(), facts(packages={"installed": installed})) == ["nvidia-driver"]
    toolkit = {"nvidia-container-toolkit": "1.20.0-1"}
    assert driver.leftovers(plan(), facts(packages={"installed": toolkit})) == []


def test_debians_module_gives_its_driver_away_without_a_word_in_its_version() -> None:
    packages = {"installed": {"nvidia-kernel-dkms": "535.261.03-1"}, "sources": [CUDA_SOURCE]}
    dkms = ["nvidia-current/535.261.03, 6.1.0-28-amd64, x86_64: installed"]
    assert driver.leftovers(plan(), facts(packages=packages, driver={"dkms": dkms})) == ["nvidia-kernel-dkms"]
    dkms = ["nvidia/570.172.08, 6.1.0-28-amd64, x86_64: installed"]
    assert driver.leftovers(plan(), facts(packages=packages, driver={"dkms": dkms})) == []


def test_the_same_names_of_the_cuda_repository_are_no_leftovers() -> None:
    installed = {
        "nvidia-driver-cuda": "580.95.05-1",
        "libnvidia-ml1": "580.95.05-1",
        "nvidia-alternative": "580.95.05-1",
    }
    assert driver.leftovers(plan(), facts(packages={"installed": installed, "sources": [CUDA_SOURCE]})) == []


def test_dkms_comes_from_epel() -> None:
    assert plan("rocky-9")["extras"] == ["epel-release"]
    assert driver.refusals(plan("rocky-9"), facts("rocky-9", packages={"sources": []})) == []
    bare = driver.refusals(plan("rhel-9"), facts("rhel-9", packages={"sources": []}))
    assert whats(bare) == ["package source EPEL"]
    epel = ["/etc/yum.repos.d/epel.repo: metalink=https://mirrors.example/epel"]
    assert driver.refusals(plan("rhel-9"), facts("rhel-9", packages={"sources": epel})) == []


def test_ubuntus_archive_and_the_cuda_repository_do_not_mix() -> None:
    canonical = {"nvidia-utils-580-server": "580.95.05-0ubuntu1", "linux-modules-nvidia-580-server-open-generic": "6.8"}
    seen = facts("ubuntu-24.04", packages={"installed": canonical, "sources": [CUDA_SOURCE]})
    assert driver.leftovers(plan("ubuntu-24.04"), seen) == sorted(canonical, reverse=False)
    assert driver.leftovers(plan("ubuntu-24.04", source="distribution"), seen) == []
    cuda = facts("ubuntu-24.04", packages={"installed": {"nvidia-dkms-580-open": "580.95.05-0ubuntu1"}})
    assert driver.leftovers(plan("ubuntu-24.04", source="distribution"), cuda) == ["nvidia-dkms-580-open"]


@pytest.mark.parametrize(("version", "refused"), [("580.95.05-1", True), ("580.105.08-1", False)])
def test_a_hold_matters_where_the_package_has_to_change(version: str, refused: bool) -> None:
    packages = {"installed": {"libnvidia-ml1": version}, "holds": ["libnvidia-ml1"], "sources": [CUDA_SOURCE]}
    seen = facts(packages=packages)
    found = driver.refusals(plan(), seen)
    assert whats(found) == (["held packages"] if refused else [])
    assert not refused or found[0].fix == "apt-mark unhold libnvidia-ml1"


def test_a_hold_of_the_container_toolkit_is_none_of_ours() -> None:
    holds = ["nvidia-container-toolkit", "libnvidia-container1"]
    assert driver.refusals(plan(), facts(packages={"holds": holds})) == []


def test_a_lock_of_dnf() -> None:
    old, new = "nvidia-driver-cuda-3:570.172.08-1.el9.*", "nvidia-driver-cuda-3:580.105.08-1.el9.*"
    found = driver.refusals(plan("rocky-9"), facts("rocky-9", packages={"holds": [old]}))
    assert whats(found) == ["locked packages"]
    assert driver.refusals(plan("rocky-9"), facts("rocky-9", packages={"holds": [new]})) == []


def test_the_keyring_is_installed_when_it_is_older_only() -> None:
    for have, wanted in (("", True), ("1.0-1", True), ("1.1-1", False), ("1.2-1", False)):
        seen = facts(packages={"installed": {"cuda-keyring": have} if have else {}})
        assert driver.keyring_wanted(plan(), seen) is wanted, have
    assert driver.keyring_wanted(plan("rocky-9"), facts("rocky-9")) is False


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, ""),
        ({"loaded": None}, ""),
        ({"on_disk": "580.119.02"}, "580.105.08 is loaded, 580.119.02 is on disk"),
        ({"library": "580.119.02"}, "its library is 580.119.02"),
        ({"loaded": None, "nouveau": True}, "nouveau is loaded"),
        ({"on_disk": None}, ""),
    ],
)
def test_a_reboot_is_for_versions_that_differ(changed: dict[str, Any], words: str) -> None:
    reason = driver.reboot_reason(serving(**changed))
    assert (words in reason) if words else reason == ""


def test_new_modules_of_the_adapters_want_the_same_boot() -> None:
    adapters = {"mlx5_core": "6.8.0", "mlx5_core_on_disk": "25.04-0.6.1"}
    assert "mlx5_core 6.8.0 is loaded" in driver.reboot_reason({**serving(), "rdma": adapters})


@pytest.mark.parametrize(("reboot", "controller", "refused"), [(True, False, 0), (False, False, 1), (True, True, 1)])
def test_an_upgrade_that_may_not_end_in_a_boot_is_not_begun(reboot: bool, controller: bool, refused: int) -> None:
    old = {"loaded": "580.95.05", "on_disk": "580.95.05", "library": "580.95.05"}
    for seen in (serving(**old), facts(driver={"nouveau": True}), serving(library="580.119.02")):
        found = driver.refusals(plan(), seen, reboot=reboot, controller=controller)
        assert whats(found) == ["reboot"] * refused
    assert driver.refusals(plan(), serving(), reboot=False, controller=True) == []
    assert driver.refusals(plan(), facts(), reboot=False, controller=True) == []


def test_a_driver_of_somebody_else_may_have_any_version_from_the_minimum_on() -> None:
    assert driver.shortfalls(plan(), serving("590.44.01"), minimum="580.65.06", gpus=2, manage=False) == []
    assert driver.shortfalls(plan(), serving("575.57.08"), minimum="580.65.06", gpus=2, manage=False)


def test_a_driver_that_runs_lacks_nothing() -> None:
    assert driver.shortfalls(plan(), serving(), minimum="580.65.06", gpus=2) == []


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"loaded": "580.95.05", "on_disk": "580.95.05", "library": "580.95.05"}, ["loaded driver"]),
        ({"library": "580.119.02"}, ["driver versions"]),
        ({"nvidia_smi": {"rc": 0, "text": "", "gpus": [{}]}}, ["nvidia-smi"]),
        ({"nvidia_smi": {"rc": 9, "text": "couldn't communicate", "gpus": []}}, ["nvidia-smi"]),
        ({"loaded": None, "nvidia_smi": {"rc": 9, "text": "", "gpus": []}}, ["loaded driver", "nvidia-smi"]),
    ],
)
def test_what_a_driver_may_lack(changed: dict[str, Any], what: list[str]) -> None:
    assert whats(driver.shortfalls(plan(), serving(**changed), minimum="580.65.06", gpus=2)) == what


@pytest.mark.parametrize(
    ("state", "version", "fine"),
    [("active", "580.105.08-1", True), ("failed", "580.105.08-1", False), ("active", "580.95.05-1", False)],
)
def test_the_fabric_manager_runs_in_the_drivers_version(state: str, version: str, fine: bool) -> None:
    seen = serving() | {"fabric_manager": {"state": state, "version": version}}
    found = driver.shortfalls(plan(nvswitches=1), seen, minimum="580.65.06", gpus=2)
    assert whats(found) == ([] if fine else ["fabric manager"])


def test_ubuntus_own_driver_may_have_any_version_from_the_minimum_on() -> None:
    wanted = plan("ubuntu-24.04", source="distribution")
    assert driver.shortfalls(wanted, serving("580.95.05"), minimum="580.65.06", gpus=2) == []
    assert whats(driver.shortfalls(wanted, serving("575.57.08"), minimum="580.65.06", gpus=2)) == ["loaded driver"]


def test_the_daemons_user_is_the_one_that_its_package_made() -> None:
    passwd = "root:x:0:0::/root:/bin/sh\nnvpd:x:120:120::/:/usr/sbin/nologin\n"
    assert driver.persistenced_user(passwd) == "nvpd"
    assert driver.persistenced_user("root:x:0:0::/root:/bin/sh") == "root"
    text = driver.persistenced_dropin("nvpd")["content"]
    assert "ExecStart=\nExecStart=/usr/bin/nvidia-persistenced --user nvpd --persistence-mode --verbose\n" in text


def test_what_modprobe_says_has_a_remedy() -> None:
    assert "mokutil" in driver.modprobe_fix("modprobe: ERROR: could not insert 'nvidia': Key was rejected by service")
    assert "headers" in driver.modprobe_fix("modprobe: FATAL: Module nvidia not found in directory /lib/modules/6.1")
    assert "dmesg" in driver.modprobe_fix("something else")


def test_the_repositories_are_not_changed_by_a_plan() -> None:
    before = copy.deepcopy(REPOSITORIES)
    plan("rocky-9")
    assert before == REPOSITORIES
