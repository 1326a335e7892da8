"""The NVIDIA driver of a host: packages with exact versions, where they come from, what keeps them there, what refuses.

`plan` is what to do on a distribution; `refusals` compares it with the facts of a host (src/pdstack/doctor/probe.py)
before anything is changed; `reboot_reason` and `shortfalls` do so afterwards. Facts are in docs/how-it-works.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from pdstack.deploy.packages import rdma, repository
from pdstack.deploy.packages.engine import upstream
from pdstack.deploy.packages.repository import File, PlanError, Repository, System
from pdstack.deploy.problem import Problem, show

NAME = "cuda"
SOURCES = ("cuda", "distribution")
FLAVOURS = ("open", "proprietary")
PROFILES = ("compute", "full")
# Distribution and release -> directory of the CUDA repository.
DIRECTORIES = {
    ("ubuntu", "22.04"): "ubuntu2204",
    ("ubuntu", "24.04"): "ubuntu2404",
    ("debian", "12"): "debian12",
    ("rhel", "9"): "rhel9",
}
# What brings EPEL, where dkms is. Of RHEL itself it is no package of the distribution.
EXTRAS = {"rocky": ["epel-release"], "almalinux": ["epel-release"], "centos": ["epel-release"]}
# What that repository calls an architecture.
PLATFORMS = {"x86_64": "x86_64", "aarch64": "sbsa"}
# From this branch on Ubuntu's and the fabric manager's packages have no branch in their names.
PLAIN_NAMES_SINCE = 590
# Which packages belong to a driver, so that one that stays behind breaks it. Not the container toolkit's.
DRIVER = re.compile(
    r"(lib)?nvidia-(?!container|docker)|libcuda1?$|cuda-drivers|nvlsm$|(lib)?nvsdm|kmod-nvidia"
    r"|linux-(modules|objects|signatures)-nvidia"
)
# Versions of Debian's own archive. Its driver renames the module (nvidia-current) in modprobe.d, so that `modprobe
# nvidia` fails with the CUDA repository's driver beside it; and it comes with these.
DEBIAN_VERSION = re.compile(r"~(deb|bpo)\d")
DEBIAN_MODULE = re.compile(r"nvidia-(current|tesla|legacy)[\w-]*/(3|4|5[0-5])\d")
DEBIAN_EXTRAS = re.compile(r"glx-alternative|update-glx$")
# Of Ubuntu's archive: the -server packages and modules that Canonical built and signed.
UBUNTU_ARCHIVE = re.compile(r".*nvidia.*-server|linux-(modules|objects|signatures)-nvidia")
# Of the CUDA repository: modules that DKMS builds, and the meta packages.
CUDA_REPOSITORY = re.compile(r"nvidia-open|nvidia-dkms|cuda-drivers|nvidia-kernel-(open-)?dkms")
# Sorts before the file of a package nvidia-driver-pinning-*: apt takes the first record that fits a version.
PIN_PATH = "/etc/apt/preferences.d/00-pdstack-nvidia.pref"
# Above 1000, so that a lower version is taken as well when the inventory goes back to one.
PIN_PRIORITY = 1002
PINNED = "*nvidia* libcuda* cuda-drivers* libnvsdm* nvlsm"
NOUVEAU = File(
    path="/etc/modprobe.d/pdstack-nouveau.conf",
    content="# Written by pdstack: the GPUs belong to nvidia.\nblacklist nouveau\noptions nouveau modeset=0\n",
)
INITRAMFS = {"deb": ["update-initramfs", "-u", "-k", "all"], "rpm": ["dracut", "--force", "--regenerate-all"]}
PERSISTENCED = "/etc/systemd/system/nvidia-persistenced.service.d/pdstack.conf"
NVLINK_MODULES = "/etc/modules-load.d/pdstack-nvlink.conf"
# The user that the package made, by distribution.
PERSISTENCED_USERS = ("nvidia-persistenced", "nvpd")
# What modprobe says, and what helps.
MODPROBE = {
    "Key was rejected": "enroll the key of DKMS at the console (mokutil --import /var/lib/dkms/mok.pub), or turn "
    "Secure Boot off",
    "not found": "the module was not built: install the headers of the running kernel, then dkms autoinstall",
    "No such device": "another driver holds the GPUs, or they are not on the PCI bus: lspci -nnk -d 10de:",
    "Invalid argument": "read `dmesg | grep NVRM`",
}


class KeyringPackage(TypedDict):
    """A package that brings key and source list: its address, the place of its list, and the version wanted."""

    url: str
    name: str
    version: str


class Plan(TypedDict):
    """What makes the driver: see the fields' names; `stream` is dnf's module stream, "" elsewhere."""

    format: str
    source: str
    branch: str
    version: str
    keyring: KeyringPackage | None
    repository: Repository | None
    headers: list[str]
    names: list[str]
    packages: list[str]
    fabric_manager: list[str]
    modules: list[str]
    pin: File
    nouveau: File
    extras: list[str]
    stream: str
    dkms: bool
    initramfs: list[str]
    files: list[str]


def system(facts: Mapping[str, Any]) -> System:
    """Return the system out of the probe's facts."""
    about = facts["os"]
    return {
        "id": about["id"],
        "version": about["version"],
        "codename": about.get("codename") or "",
        "machine": about["arch"],
        "kernel": about["kernel"],
        "manager": facts["packages"]["manager"],
    }


def plan(
    host: System,
    *,
    branch: str,
    version: str,
    minimum: str,
    repositories: Mapping[str, Any],
    source: str = "cuda",
    flavour: str = "open",
    profile: str = "compute",
    nvswitches: int = 0,
    nvlink5: bool = False,
    packages: Sequence[str] = (),
) -> Plan:
    """Return the plan for driver `version` of `branch` on `host`; PlanError when there is none.

    `nvswitches` on the PCI bus bring the fabric manager, `nvlink5` (B200, B300) its subnet manager too. `packages`
    replaces the computed names, for a distribution whose names changed. A `source: distribution` has the version that
    it has: only its branch is fixed.
    """
    for what, value, words in (
        ("gpu_driver__source", source, SOURCES),
        ("gpu_driver__flavour", flavour, FLAVOURS),
        ("gpu_driver__profile", profile, PROFILES),
    ):
        if value not in words:
            raise PlanError(f"{what}: found {value!r}, wanted one of {', '.join(words)}. Set one of them")
    _check_version(branch, version, minimum)
    kind = repository.package_format(host)
    deb = kind == "deb"
    cuda = source == "cuda"
    if not cuda and host["id"] != "ubuntu":
        raise PlanError(
            f"gpu_driver__source distribution: found {host['id']} {host['version']}, whose own archive has no driver "
            f"of branch {branch}; wanted Ubuntu. Set gpu_driver__source: cuda"
        )
    names = list(packages) or _names(host, branch, cuda, flavour, profile)
    switch = _fabric_manager(branch, deb, cuda, nvlink5) if nvswitches else []
    exact = version if cuda else ""
    keyring, repo = _repository(host, repositories) if cuda else (None, None)
    pin = _pin(version if cuda else f"{branch}.*") if deb else File(path="", content="")
    return {
        "format": kind,
        "source": source,
        "branch": branch,
        "version": exact,
        "keyring": keyring,
        "repository": repo,
        "headers": _headers(host) if cuda else [],
        "names": [*names, *switch],
        "packages": [_versioned(name, exact, deb) for name in [*names, *switch]],
        "fabric_manager": switch,
        "modules": ["ib_umad"] if switch and nvlink5 else [],
        "pin": pin,
        "nouveau": NOUVEAU,
        "extras": EXTRAS.get(host["id"], []) if cuda else [],
        "stream": "" if deb else f"{branch}-{'open' if flavour == 'open' else 'dkms'}",
        "dkms": cuda,
        "initramfs": INITRAMFS[kind],
        "files": [path for path in (NOUVEAU["path"], pin["path"], PERSISTENCED, NVLINK_MODULES) if path],
    }


def _check_version(branch: str, version: str, minimum: str) -> None:
    if not re.fullmatch(r"\d{3}\.\d+(\.\d+)?", version):
        raise PlanError(f"versions.gpu.driver: found {version!r}, wanted a release such as 580.105.08. Correct it")
    if version.split(".")[0] != branch:
        raise PlanError(
            f"versions.gpu.driver: found {version}, wanted a release of branch {branch} (versions.gpu.driver_branch). "
            "Change both together"
        )
    if upstream(version) < upstream(minimum):
        raise PlanError(
            f"versions.gpu.driver: found {version}, wanted {minimum} or later (versions.gpu.driver_minimum): the "
            "runtime image would not start on it. Choose a later release"
        )


def _names(host: System, branch: str, cuda: bool, flavour: str, profile: str) -> list[str]:
    """Return the packages without the fabric manager, as the distribution's directory names them."""
    system = repository.LIKE.get(host["id"], host["id"])
    opened = flavour == "open"
    if not cuda:
        kernel = host["kernel"]
        kind = re.sub(r"^[\d.]+-\d+-?", "", kernel) or "generic"
        server = f"{branch}-server"
        modules = f"linux-modules-nvidia-{server}{'-open' if opened else ''}"
        # Canonical builds and signs the module for each kernel: the one that runs, and the meta package for the next.
        return [
            f"nvidia-headless-no-dkms-{server}{'-open' if opened else ''}",
            f"libnvidia-compute-{server}",
            f"nvidia-utils-{server}",
            f"nvidia-compute-utils-{server}",
            f"{modules}-{kernel}",
            f"{modules}-{kind}",
        ]
    if profile == "full":
        return ["nvidia-open" if opened else "cuda-drivers", "nvidia-persistenced"]
    if system == "debian":
        return ["nvidia-driver-cuda", f"nvidia-kernel-{'open-' if opened else ''}dkms", "nvidia-persistenced"]
    if system == "rhel":
        return ["nvidia-driver-cuda", f"kmod-nvidia-{'open' if opened else 'latest'}-dkms", "nvidia-persistenced"]
    suffix = "" if int(branch) >= PLAIN_NAMES_SINCE else f"-{branch}"
    names = [f"libnvidia-compute{suffix}", f"nvidia-utils{suffix}", f"nvidia-dkms{suffix}{'-open' if opened else ''}"]
    # Up to 580 the persistence daemon came inside of Ubuntu's compute-utils.
    return [*names, f"nvidia-compute-utils{suffix}" if suffix else "nvidia-persistenced"]


def _fabric_manager(branch: str, deb: bool, cuda: bool, nvlink5: bool) -> list[str]:
    plain = int(branch) >= PLAIN_NAMES_SINCE or not deb
    suffix = "" if plain and cuda else f"-{branch}"
    return [f"nvidia-fabricmanager{suffix}", *(["nvlsm"] if nvlink5 else [])]


def _headers(host: System) -> list[str]:
    """Return the headers of the kernel that runs: those of another build modules for a kernel that is not there yet."""
    if repository.package_format(host) == "deb":
        return [f"linux-headers-{host['kernel']}"]
    return [f"kernel-devel-{host['kernel']}", f"kernel-headers-{host['kernel'].rsplit('.', 1)[0]}"]


def _versioned(name: str, version: str, deb: bool) -> str:
    """Return the package with its version; nvlsm has versions of its own."""
    if not version or name == "nvlsm":
        return name
    # The revision differs between distributions (-1, -0ubuntu1).
    return f"{name}={version}-*" if deb else f"{name}-{version}"


def _pin(version: str) -> File:
    """Return the apt preferences that keep everything of a driver on its version.

    NVIDIA's meta packages depend on `>=`, so without it a host gets parts of the next branch. A hold would do that too,
    and would stop the next run of this role.
    """
    pattern = version if version.endswith("*") else f"{version}-*"
    content = f"# Written by pdstack.\nPackage: {PINNED}\nPin: version {pattern}\nPin-Priority: {PIN_PRIORITY}\n"
    return File(path=PIN_PATH, content=content)


def _repository(host: System, repositories: Mapping[str, Any]) -> tuple[KeyringPackage | None, Repository | None]:
    system = repository.LIKE.get(host["id"], host["id"])
    release = host["version"] if system == "ubuntu" else host["version"].split(".")[0]
    directory, platform = DIRECTORIES.get((system, release)), PLATFORMS.get(host["machine"])
    if directory is None or platform is None:
        raise PlanError(
            f"driver for {host['id']} {host['version']} {host['machine']}: NVIDIA's repository has no directory that "
            "this project knows; wanted Ubuntu 22.04 or 24.04, Debian 12, RHEL or Rocky 9. Install the driver by hand "
            "and set gpu_driver__manage: false"
        )
    kind = repository.package_format(host)
    words = {"{directory}": directory, "{platform}": platform}
    chosen: dict[str, Any] = dict(repositories.get(NAME, {}).get(kind) or {})
    for key, value in chosen.items():
        for word, known in words.items():
            if isinstance(value, str):
                chosen[key] = value = value.replace(word, known)
    keyring = chosen.pop("keyring", None)
    if kind == "deb" and keyring and not chosen.get("key"):
        uri = repository.fill(str(chosen["uri"]), host)
        url = f"{uri.rstrip('/')}/{keyring['package']}_{keyring['version']}_all.deb"
        return KeyringPackage(url=url, name=keyring["package"], version=keyring["version"]), None
    return None, repository.repository(NAME, {kind: chosen} if chosen else {}, host)


def refusals(
    wanted: Plan, facts: Mapping[str, Any], *, purge: bool = False, reboot: bool = True, controller: bool = False
) -> list[Problem]:
    """Return what on a host is in the way of `wanted` beside what the doctor checks; nothing was changed yet.

    With `purge` leftovers of other archives are removed and not refused; `reboot` says whether the host may be,
    `controller` that it is where Ansible runs, which cannot. The doctor has the checks of a bare host: GPUs on the PCI
    bus, Secure Boot, a driver of a .run file.
    """
    found = [*_system(facts), *_installations(wanted, facts, purge)]
    return [*found, *_epel(wanted, facts), *_held(wanted, facts), *_boot(wanted, facts, reboot, controller)]


def _boot(wanted: Plan, facts: Mapping[str, Any], allowed: bool, controller: bool) -> list[Problem]:
    """What needs a boot is refused before the packages change: half an upgrade is a host that serves nothing."""
    reason = reboot_reason(facts)
    loaded = facts["driver"]["loaded"]
    if not reason and wanted["version"] and loaded and loaded != wanted["version"]:
        reason = f"driver {loaded} is loaded, {wanted['version']} is to be"
    if not reason or (allowed and not controller):
        return []
    fix = "deploy from another machine" if controller else "set gpu_driver__reboot: true"
    return [
        Problem(
            "reboot",
            reason,
            "a boot, which this run may not do" + (" (the host is the controller itself)" if controller else ""),
            f"{fix}, or keep the driver that is loaded (gpu_driver__version, or gpu_driver__manage: false)",
        )
    ]


def _system(facts: Mapping[str, Any]) -> list[Problem]:
    if not facts["os"].get("dgx"):
        return []
    return [
        Problem(
            "operating system",
            "DGX OS, which has a driver stack of its own",
            "a host whose driver this project may replace",
            "set gpu_driver__manage: false and update the driver as NVIDIA's DGX documentation says",
        )
    ]


def leftovers(wanted: Plan, facts: Mapping[str, Any]) -> list[str]:
    """Return the installed packages of another source than the plan's, which have to go before its own can work."""
    packages = facts["packages"]
    installed = packages["installed"]
    drivers = [name for name in sorted(installed) if DRIVER.match(name)]
    if wanted["format"] != "deb" or not drivers:
        return []
    if wanted["source"] == "distribution":
        return [name for name in drivers if CUDA_REPOSITORY.match(name)]
    # A driver on a host that does not know the CUDA repository came from somewhere else.
    known = any(NAME in source for source in packages.get("sources", ()))
    renamed = any(DEBIAN_MODULE.match(line) for line in facts["driver"].get("dkms") or ())
    extras = [name for name in installed if DEBIAN_EXTRAS.match(name)]
    if not known or renamed:
        return sorted([*drivers, *extras])
    if foreign := [name for name in drivers if DEBIAN_VERSION.search(installed[name])]:
        return sorted([*foreign, *extras])
    return [name for name in drivers if UBUNTU_ARCHIVE.match(name)]


def _installations(wanted: Plan, facts: Mapping[str, Any], purge: bool) -> list[Problem]:
    found = []
    if (other := leftovers(wanted, facts)) and not purge:
        found.append(
            Problem(
                "driver packages of another source",
                ", ".join(other[:6]) + (f" and {len(other) - 6} more" if len(other) > 6 else ""),
                f"packages of the {'CUDA repository' if wanted['source'] == 'cuda' else 'Ubuntu archive'} alone",
                f"apt-get purge {' '.join(other)}, or set gpu_driver__purge: true",
            )
        )
    return found


def _epel(wanted: Plan, facts: Mapping[str, Any]) -> list[Problem]:
    known = any("epel" in source.lower() for source in facts["packages"].get("sources", ()))
    if wanted["format"] != "rpm" or not wanted["dkms"] or wanted["extras"] or known:
        return []
    return [
        Problem(
            "package source EPEL",
            "none in /etc/yum.repos.d",
            "EPEL, which has dkms, and CodeReady Builder",
            "subscription-manager repos --enable codeready-builder-for-rhel-9-$(arch)-rpms, then dnf install "
            "https://dl.fedoraproject.org/pub/epel/epel-release-latest-9.noarch.rpm (or the site's mirror of it)",
        )
    ]


def _held(wanted: Plan, facts: Mapping[str, Any]) -> list[Problem]:
    """A held package only matters when it has to change."""
    packages = facts["packages"]
    deb = wanted["format"] == "deb"
    target = wanted["version"] or f"{wanted['branch']}."
    held = []
    for line in packages.get("holds", ()):
        # dnf's lock is name-epoch:version-release.*; apt's hold a name.
        name = line if deb else re.split(r"-\d+:", line)[0]
        version = packages["installed"].get(name, "") if deb else line[len(name) + 1 :]
        if DRIVER.match(name) and not re.sub(r"^\d+:", "", version).startswith(target):
            held.append(line)
    if not held:
        return []
    return [
        Problem(
            "held packages" if deb else "locked packages",
            ", ".join(held),
            f"packages that may become {wanted['version'] or wanted['branch']}; a pin keeps them there afterwards",
            f"apt-mark unhold {' '.join(held)}" if deb else f"dnf versionlock delete {' '.join(held)}",
        )
    ]


def stream_steps(wanted: str, current: str) -> list[list[str]]:
    """Return the commands that bring dnf to the module stream; enabling another does not switch by itself."""
    if not wanted or wanted == current:
        return []
    reset = [["dnf", "--assumeyes", "module", "reset", "nvidia-driver"]] if current else []
    return [*reset, ["dnf", "--assumeyes", "module", "enable", f"nvidia-driver:{wanted}"]]


def keyring_wanted(wanted: Plan, facts: Mapping[str, Any]) -> bool:
    """Say whether the keyring package is missing or older; a later one stays."""
    if wanted["keyring"] is None:
        return False
    have = facts["packages"]["installed"].get(wanted["keyring"]["name"], "")
    return _key(have) < _key(wanted["keyring"]["version"])


def _key(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def reboot_reason(facts: Mapping[str, Any]) -> str:
    """Return why the host has to boot (modules that are not the installed ones, nouveau); empty when it need not."""
    driver = facts["driver"]
    loaded, disk, library = driver["loaded"], driver["on_disk"], driver["library"]
    if loaded and disk and loaded != disk:
        return f"driver {loaded} is loaded, {disk} is on disk"
    if loaded and library and loaded != library:
        return f"driver {loaded} is loaded, its library is {library}"
    if driver["nouveau"]:
        return "nouveau is loaded and holds the GPUs"
    # DOCA's modules were installed by the role rdma, which comes before: one boot does for both.
    adapters = facts.get("rdma") or {}
    return rdma.reboot_reason(adapters.get("mlx5_core") or "", adapters.get("mlx5_core_on_disk") or "")


def modprobe_fix(text: str) -> str:
    """Return what helps against what modprobe said."""
    return next((fix for words, fix in MODPROBE.items() if words in text), "read `dmesg | grep -i -e nvidia -e NVRM`")


def shortfalls(
    wanted: Plan, facts: Mapping[str, Any], *, minimum: str, gpus: int, manage: bool = True
) -> list[Problem]:
    """Return what a host whose driver was installed still lacks; empty when containers can use its GPUs.

    A driver that is not ours (`manage` false) may have any version from `minimum` on.
    """
    driver = facts["driver"]
    smi = driver["nvidia_smi"]
    found = []
    loaded = driver["loaded"] or ""
    target = wanted["version"] if manage else ""
    right = loaded == target if target else bool(loaded) and upstream(loaded) >= upstream(minimum)
    if not right:
        found.append(
            Problem(
                "loaded driver", show(loaded), target or f"{minimum} or later",
                "read `dmesg | grep NVRM` and `dkms status`, reboot the host, then run again",
            )
        )  # fmt: skip
    if reason := reboot_reason(facts):
        found.append(Problem("driver versions", reason, "one version", "drain the host and reboot it"))
    if smi["rc"] != 0 or len(smi["gpus"]) < gpus:
        text = " ".join(str(smi.get("text") or "").split())
        found.append(
            Problem(
                "nvidia-smi", f"status {smi['rc']}, {len(smi['gpus'])} GPUs{': ' + text if text else ''}",
                f"status 0, {gpus} GPUs", "read `dmesg | grep -e NVRM -e Xid`; a GPU that is missing fell off the bus",
            )
        )  # fmt: skip
    manager = facts.get("fabric_manager") or {}
    if wanted["fabric_manager"] and (manager.get("state") != "active" or not _same(manager.get("version"), loaded)):
        found.append(
            Problem(
                "fabric manager", f"{manager.get('state') or 'absent'}, version {manager.get('version') or 'none'}",
                f"active, version {loaded}", "journalctl -u nvidia-fabricmanager; CUDA says error 802 without it",
            )
        )  # fmt: skip
    return found


def _same(version: object, loaded: str) -> bool:
    return bool(loaded) and re.sub(r"^\d+:", "", str(version or "")).split("-")[0] == loaded


def persistenced_user(passwd: str) -> str:
    """Return the daemon's user out of `getent passwd`; root where its package made none."""
    names = [line.split(":", 1)[0] for line in passwd.splitlines()]
    return next((name for name in PERSISTENCED_USERS if name in names), "root")


def persistenced_dropin(user: str) -> File:
    """Return the drop-in that turns persistence on; NVIDIA's units have shipped with --no-persistence-mode."""
    content = (
        "# Written by pdstack.\n[Service]\nExecStart=\n"
        f"ExecStart=/usr/bin/nvidia-persistenced --user {user} --persistence-mode --verbose\n"
    )
    return File(path=PERSISTENCED, content=content)
