"""A tree of files that is a GPU host to the probe: /sys, /proc, the package database, and programs that answer.

    make(root)                                   a provisioned host with two GPUs, everything right
    make(root, gpus=8, nvswitches=4, nics=8)     a bigger one
    make(root, driver=None, docker=None)         a bare one
    make(root, library="580.126.09")             one whose driver was upgraded under the loaded module
    python -m tests.standins.fakehost ROOT [NAME=VALUE]...     the same from a shell (values are YAML)

What a program prints is what the real one prints; its failures are those of the real one too.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

DRIVER = "580.105.08"
LINES = "\n".join
SMI_FAILURES = {
    9: "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running.\n",
    12: "NVIDIA-SMI couldn't find libnvidia-ml.so library in your system. Please make sure that the NVIDIA Display "
    "Driver is properly installed and present in your system.\nPlease also try adding directory that contains "
    "libnvidia-ml.so to your system PATH.\n",
    18: "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: {library}\n",
}
RELEASES = {
    "ubuntu 24.04": ("ubuntu", "24.04", "debian", "noble", "6.8.0-87-generic"),
    "ubuntu 22.04": ("ubuntu", "22.04", "debian", "jammy", "5.15.0-160-generic"),
    "debian 12": ("debian", "12", "", "bookworm", "6.1.0-40-amd64"),
    "rocky 9": ("rocky", "9.6", "rhel centos fedora", "", "5.14.0-570.52.1.el9_6.x86_64"),
    "fedora 42": ("fedora", "42", "", "", "6.16.10-200.fc42.x86_64"),
}
BLACKLIST = ("^nvidia-", "^libnvidia-", "^cuda-", "^docker-ce", "^containerd")
SAME = "same as the driver"


@dataclass
class Fake:
    """What the host is. Versions that say SAME follow `driver`."""

    os: str = "ubuntu 24.04"
    arch: str = "x86_64"
    kernel: str = ""
    newest_kernel: str = ""
    virtual: bool = False
    # PCI and the driver
    gpus: int = 2
    gpu_name: str = "NVIDIA H100 80GB HBM3"
    nvswitches: int = 0
    driver: str | None = DRIVER
    loaded: str | None = SAME
    on_disk: str | None = SAME
    library: str | None = SAME
    flavour: str = "open"
    nouveau: bool = False
    secure_boot: bool | None = False
    signer: str = "DKMS module signing key"
    key_enrolled: bool | None = None
    headers: bool = True
    dkms: str = "installed"
    smi: int | None = -1
    """Status of nvidia-smi: -1 as the versions have it, None not installed."""
    smi_gpus: int = -1
    persistence: str = "Enabled"
    ecc: str = "0"
    compute_mode: str = "Default"
    mig: str = "Disabled"
    link: str = "NV18"
    nic_link: str = "PIX"
    p2p: str = "OK"
    fabric: str = "Completed, Success"
    fabric_manager: str | None = SAME
    fabric_manager_state: str = "active"
    # packages
    packages: dict[str, str] = field(default_factory=dict)
    holds: Sequence[str] = ()
    blacklist: Sequence[str] = BLACKLIST
    pin: bool = True
    run_file: bool = False
    reboot_required: bool = False
    # containers
    docker: str | None = "28.3.3"
    runtimes: Sequence[str] = ("io.containerd.runc.v2", "nvidia", "runc")
    cgroup_driver: str = "systemd"
    cgroup_version: str = "2"
    daemon_json: str | None = '{"runtimes": {"nvidia": {"args": [], "path": "nvidia-container-runtime"}}}'
    dockerd_flags: Sequence[str] = ("-H", "fd://", "--containerd=/run/containerd/containerd.sock")
    toolkit: str | None = "1.20.0-1"
    toolkit_packages: dict[str, str] = field(default_factory=dict)
    cdi: bool = True
    stale_cdi: bool = False
    containers: Sequence[Mapping[str, Any]] = ()
    memlock: str = "infinity"
    image: Mapping[str, Any] | None = None
    """What containers of an image see: gpus, uid, gid, memlock, versions, transports, complaints, perf_mb_s."""
    # RDMA
    nics: int = 0
    link_layer: str = "InfiniBand"
    nic_state: str = "ACTIVE"
    nic_numa: int | None = None
    """The NUMA node of all adapters; None: they are spread as the GPUs are."""
    gid_type: str = "RoCE v2"
    ofed: str = ""
    mlx5_core: str = ""
    mlx5_core_on_disk: str = SAME
    peermem: bool = False
    nv_mem: bool = False
    uverbs: bool = True
    gdrdrv: bool = False
    # the rest of the machine
    acs: int = 0
    bridges: int = 2
    cmdline: str = "BOOT_IMAGE=/vmlinuz root=/dev/sda2 ro iommu=pt"
    interfaces: Mapping[str, tuple[str, int]] = field(default_factory=lambda: {"eth0": ("10.0.0.1", 9000)})
    listeners: Sequence[Mapping[str, Any]] = ()
    sysctl: dict[str, str] = field(default_factory=dict)
    memory_mib: int = 1024 * 1024
    disk_mib: int = 2 * 1024 * 1024
    shm_mib: int = 512 * 1024
    synchronized: bool | None = True
    offset_s: float = 0.0001
    kernel_log: Sequence[str] = ()
    real: Sequence[str] = ()
    """Paths that are links to those of this machine, such as proc/net, proc/meminfo or var/lib/dpkg."""


class Tree:
    """Writes files and programs below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def file(self, path: str, content: str | bytes = "") -> Path:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())
        return target

    def directory(self, path: str) -> None:
        (self.root / path.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def link(self, path: str, target: str) -> None:
        at = self.root / path.lstrip("/")
        at.parent.mkdir(parents=True, exist_ok=True)
        at.symlink_to(target)

    def program(self, name: str, script: str | None) -> None:
        """Write a program; None: one that the host lacks."""
        target = self.file(f"usr/bin/{name}", "" if script is None else f"#!/bin/sh\n{script}\n")
        target.chmod(0o644 if script is None else 0o755)


def show(text: str) -> str:
    """Return the shell words that print a text."""
    return f"printf '%s' {shlex.quote(text)}"


def cases(variable: str, scripts: Mapping[str, str], otherwise: str = "exit 1") -> str:
    """Return a shell case over a variable."""
    arms = "".join(f"  {pattern}) {script} ;;\n" for pattern, script in scripts.items())
    return f"case {variable} in\n{arms}  *) {otherwise} ;;\nesac"


def make(root: Path | str, **what: Any) -> Path:
    """Write the tree anew and return its root. The names are those of `Fake`; TypeError for others."""
    root = Path(root)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    fake, tree = resolved(Fake(**what)), Tree(root)
    for write in (operating_system, pci, driver, packages, engine, rdma, network, machine):
        write(tree, fake)
    for path in fake.real:
        at = root / path
        if at.is_dir() and not at.is_symlink():
            shutil.rmtree(at)
        at.unlink(missing_ok=True)
        tree.link(path, f"/{path}")
    return root


def resolved(fake: Fake) -> Fake:
    """Fill in what follows from something else."""
    for name in ("loaded", "on_disk", "library", "fabric_manager"):
        if getattr(fake, name) == SAME:
            setattr(fake, name, fake.driver)
    if not fake.nvswitches and fake.fabric_manager == fake.driver:
        fake.fabric_manager = None
    if fake.mlx5_core_on_disk == SAME:
        fake.mlx5_core_on_disk = fake.mlx5_core
    fake.kernel = fake.kernel or RELEASES[fake.os][4]
    fake.newest_kernel = fake.newest_kernel or fake.kernel
    return fake


def operating_system(tree: Tree, fake: Fake) -> None:
    name, version, like, codename, _ = RELEASES[fake.os]
    tree.file(
        "etc/os-release",
        f'ID={name}\nVERSION_ID="{version}"\nID_LIKE="{like}"\n'
        + (f"VERSION_CODENAME={codename}\n" if codename else ""),
    )
    tree.file("proc/sys/kernel/osrelease", fake.kernel + "\n")
    tree.file("proc/sys/kernel/arch", fake.arch + "\n")
    tree.file("proc/cpuinfo", "flags\t\t: fpu vme sse2" + (" hypervisor" if fake.virtual else "") + "\n")
    for kernel in {fake.kernel, fake.newest_kernel}:
        tree.file(f"lib/modules/{kernel}/modules.dep")
    if fake.headers:
        tree.file(f"lib/modules/{fake.kernel}/build/Makefile")
    if fake.reboot_required:
        tree.file("var/run/reboot-required", "*** System restart required ***\n")
    tree.directory("sys/fs/cgroup")
    if fake.cgroup_version == "2":
        tree.file("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory\n")
    if fake.secure_boot is None:
        tree.directory("sys/firmware/efi")
        tree.program("mokutil", None)
    else:
        variable = b"\x06\x00\x00\x00" + (b"\x01" if fake.secure_boot else b"\x00")
        tree.file("sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c", variable)
        enrolled = "is already enrolled" if fake.key_enrolled else "is not enrolled"
        tree.program(
            "mokutil",
            cases(
                '"$1"',
                {
                    "--sb-state": f"echo 'SecureBoot {'enabled' if fake.secure_boot else 'disabled'}'",
                    "--test-key": f'echo "$2 {enrolled}"',
                },
            ),
        )
    if fake.key_enrolled is not None:
        tree.file("var/lib/dkms/mok.pub")


def pci(tree: Tree, fake: Fake) -> None:
    tree.directory("sys/bus/pci/devices")

    def device(address: str, vendor: str, kind: str, number: str, numa: int) -> None:
        base = f"sys/bus/pci/devices/{address}"
        for name, value in (("vendor", vendor), ("class", kind), ("device", number), ("numa_node", str(numa))):
            tree.file(f"{base}/{name}", value + "\n")

    for index in range(fake.gpus):
        device(gpu_address(index), "0x10de", "0x030200", "0x2330", index * 2 // max(fake.gpus, 1))
    for index in range(fake.nvswitches):
        device(f"0000:{0xA0 + index:02x}:00.0", "0x10de", "0x068000", "0x22a3", 1)
    for index in range(fake.nics):
        kind = "0x020700" if fake.link_layer == "InfiniBand" else "0x020000"
        device(nic_address(index), "0x15b3", kind, "0x1021", nic_node(fake, index))
    for index in range(fake.bridges):
        address = f"0000:{index:02x}:01.0"
        device(address, "0x8086", "0x060400", "0x352a", 0)
        # The extended capability ACS (000dh, version 1, none behind it), its control register 6 bytes on.
        acs = struct.pack("<IHH", 0x0001000D, 0x1D, 0x1D if index < fake.acs else 0)
        tree.file(f"sys/bus/pci/devices/{address}/config", bytes(0x100) + acs + bytes(64))


def gpu_address(index: int) -> str:
    return f"0000:{0x19 + 0x10 * index:02x}:00.0"


def nic_node(fake: Fake, index: int) -> int:
    return index * 2 // fake.nics if fake.nic_numa is None else fake.nic_numa


def nic_address(index: int) -> str:
    return f"0000:{0x1A + 0x10 * index:02x}:00.0"


def driver(tree: Tree, fake: Fake) -> None:
    license_ = "Dual MIT/GPL" if fake.flavour == "open" else "NVIDIA"
    if fake.loaded:
        words = "UNIX Open Kernel Module for x86_64" if fake.flavour == "open" else "UNIX x86_64 Kernel Module"
        tree.file("sys/module/nvidia/version", fake.loaded + "\n")
        tree.file(
            "proc/driver/nvidia/version",
            f"NVRM version: NVIDIA {words}  {fake.loaded}  Release Build  (dvs-builder@U22-I3-AM02-24-3)\n"
            "GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)\n",
        )
    if fake.nouveau:
        tree.directory("sys/module/nouveau")
    if fake.library:
        tree.file(f"usr/lib/x86_64-linux-gnu/libnvidia-ml.so.{fake.library}")
        tree.link("usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1", f"libnvidia-ml.so.{fake.library}")
    modules = {}
    if fake.on_disk:
        modules["nvidia"] = show(
            f"filename:       /lib/modules/{fake.kernel}/updates/dkms/nvidia.ko.zst\nversion:        {fake.on_disk}\n"
            f"license:        {license_}\nsigner:         {fake.signer}\n"
        )
    if fake.mlx5_core_on_disk:
        modules["mlx5_core"] = show(
            f"filename:       /lib/modules/{fake.kernel}/updates/dkms/mlx5_core.ko\n"
            f"version:        {fake.mlx5_core_on_disk}\n"
        )
    tree.program(
        "modinfo",
        'for name; do :; done\n'
        + cases('"$name"', modules, 'echo "modinfo: ERROR: Module $name not found." >&2; exit 1'),
    )  # fmt: skip
    if fake.on_disk and fake.dkms:
        tree.directory("var/lib/dkms/nvidia")
        tree.program("dkms", f"echo 'nvidia/{fake.on_disk}, {fake.kernel}, {fake.arch}: {fake.dkms}'")
    else:
        tree.program("dkms", None)
    tree.program("nvidia-smi", smi(fake))
    # That of this machine knows another one's libraries.
    tree.program("ldconfig", None)


def smi_status(fake: Fake) -> int | None:
    """Return the status that nvidia-smi ends with, None if it is not installed."""
    if fake.smi != -1:
        return fake.smi
    if fake.driver is None and fake.library is None:
        return None
    if not fake.library:
        return 12
    if not fake.loaded:
        return 9
    return 0 if fake.loaded == fake.library else 18


def smi(fake: Fake) -> str | None:
    status = smi_status(fake)
    if status is None:
        return None
    if status:
        text = SMI_FAILURES[status].format(library=(fake.library or "").rpartition(".")[0])
        return f"{show(text)}\nexit {status}"
    count = fake.gpus if fake.smi_gpus < 0 else fake.smi_gpus
    fabric = f", {fake.fabric}" if fake.nvswitches else ""
    table = LINES(
        f"{i}, GPU-{i:08d}-8c6f-0000-0000-{i:012d}, {fake.gpu_name}, 81559, {fake.persistence}, {fake.ecc}, "
        f"{fake.compute_mode}, {fake.mig}, 0000{gpu_address(i).upper()}{fabric}"
        for i in range(count)
    )
    names = [f"GPU{i}" for i in range(count)]
    nics = [f"NIC{i}" for i in range(fake.nics)]
    everyone = names + nics

    def link(one: str, other: str) -> str:
        if one == other:
            return " X "
        if one.startswith("GPU") and other.startswith("GPU"):
            return fake.link
        return fake.nic_link if one[3:] == other[3:] else "SYS"

    matrix = LINES(
        ["\t" + "\t".join(everyone) + "\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID"]
        + [
            one + "\t" + "\t".join(link(one, other) for other in everyone)
            + ("\t0-47\t0\t\tN/A" if one.startswith("GPU") else "")
            for one in everyone
        ]
        + ["", "Legend:", "", "  X    = Self"]
        + (["", "NIC Legend:", ""] + [f"  NIC{i}: mlx5_{i}" for i in range(fake.nics)] if nics else [])
    )  # fmt: skip
    peers = LINES(
        [" \t" + "\t".join(names) + "\t"]
        + [f" {one}\t" + "\t".join("X" if one == other else fake.p2p for other in names) + "\t" for one in names]
        + ["", "Legend:", "", "  X    = Self", "  OK   = Status Ok"]
    )
    listed = LINES(f"GPU {i}: {fake.gpu_name} (UUID: GPU-{i:08d}-8c6f-0000-0000-{i:012d})" for i in range(count))
    return cases(
        '"$*"',
        {
            "--query-gpu=*": show(table + "\n"),
            '"topo -m"': show(matrix + "\n"),
            '"topo -p2p r"': show(peers + "\n"),
            "-L": show(listed + "\n"),
        },
        "exit 2",
    )


def packages(tree: Tree, fake: Fake) -> None:
    installed = {"unattended-upgrades": "2.9.1+nmu4"}
    if fake.on_disk:
        branch = fake.on_disk.split(".")[0]
        installed |= {f"nvidia-dkms-{branch}-open": f"{fake.on_disk}-0ubuntu1", f"nvidia-driver-pinning-{branch}": "1"}
        if not fake.pin:
            del installed[f"nvidia-driver-pinning-{branch}"]
    if fake.library:
        installed[f"libnvidia-compute-{fake.library.split('.')[0]}"] = f"{fake.library}-0ubuntu1"
    if fake.fabric_manager:
        installed["nvidia-fabricmanager"] = f"{fake.fabric_manager}-1"
    if fake.docker:
        installed |= {"docker-ce": f"5:{fake.docker}-1~ubuntu.24.04~noble", "containerd.io": "1.7.27-1"}
    if fake.toolkit:
        for name in (
            "nvidia-container-toolkit", "nvidia-container-toolkit-base", "libnvidia-container-tools",
            "libnvidia-container1",
        ):  # fmt: skip
            installed[name] = fake.toolkit_packages.get(name, fake.toolkit)
    installed |= fake.packages
    if fake.os.split()[0] in ("rocky", "fedora"):
        rpms = LINES(f"{name} 0:{version}" for name, version in installed.items())
        tree.program("rpm", show(rpms + "\n"))
        if fake.pin:
            tree.file(
                "etc/dnf/modules.d/nvidia-driver.module", "[nvidia-driver]\nname=nvidia-driver\nstream=580-open\n"
            )
        if fake.holds:
            tree.file("etc/dnf/plugins/versionlock.list", LINES(fake.holds) + "\n")
    else:
        status = "".join(
            f"Package: {name}\nStatus: {'hold' if name in fake.holds else 'install'} ok installed\n"
            f"Architecture: amd64\nVersion: {version}\n\n"
            for name, version in sorted(installed.items())
        )
        tree.file("var/lib/dpkg/status", status)
        patterns = LINES(f'  "{pattern}";' for pattern in fake.blacklist)
        if fake.blacklist:
            tree.file(
                "etc/apt/apt.conf.d/52pdstack-gpu", f"Unattended-Upgrade::Package-Blacklist {{\n{patterns}\n}};\n"
            )
        tree.file("etc/apt/sources.list.d/debian.sources", "Types: deb\nURIs: http://deb.debian.org/debian\n")
        if any("nvidia" in name for name in installed):
            # A driver of a repository that the host does not know is taken for another source's.
            tree.file("etc/apt/sources.list.d/cuda.list", "deb file:/srv/mirror/cuda/ /\n")
    if fake.run_file:
        tree.program("nvidia-uninstall", "exit 0")


def engine(tree: Tree, fake: Fake) -> None:
    units = [unit("nvidia-cdi-refresh.path", "active" if fake.toolkit else "")]
    if fake.docker:
        flags = " ".join(("/usr/bin/dockerd", *fake.dockerd_flags))
        units.append(
            unit("docker.service", "active")
            + f"\nLimitMEMLOCK={fake.memlock}\nLimitNOFILE=1048576\n"
            + f"ExecStart={{ path=/usr/bin/dockerd ; argv[]={flags} ; ignore_errors=no ; start_time=[n/a] }}"
        )
    if fake.fabric_manager:
        units.append(unit("nvidia-fabricmanager.service", fake.fabric_manager_state))
    units.append(unit("nvidia-persistenced.service", "active" if fake.persistence == "Enabled" else "inactive"))
    tree.program("systemctl", cases('"$1"', {"show": show("\n\n".join(units) + "\n")}))
    if fake.daemon_json is not None and fake.docker:
        tree.file("etc/docker/daemon.json", fake.daemon_json)
    tree.program("docker", docker(fake) if fake.docker else None)
    if not fake.toolkit:
        tree.program("nvidia-ctk", None)
        return
    devices = ["nvidia.com/gpu=all", *(f"nvidia.com/gpu={i}" for i in range(fake.gpus))] if fake.cdi else []
    tree.program(
        "nvidia-ctk",
        cases(
            '"$*"',
            {
                "--version": show(
                    f"NVIDIA Container Toolkit CLI version {fake.toolkit.split('-')[0]}\ncommit: 6ff57e2\n"
                ),
                '"cdi list"': show(LINES(devices) + "\n"),
            },
        ),
    )
    if fake.cdi:
        tree.file("var/run/cdi/nvidia.yaml", f"cdiVersion: 0.5.0\n# libcuda.so.{fake.library}\n")
    if fake.stale_cdi:
        tree.file("etc/cdi/nvidia.yaml", "cdiVersion: 0.5.0\n# /usr/lib/x86_64-linux-gnu/libcuda.so.535.183.01\n")
    tree.file("etc/nvidia-container-runtime/config.toml", '[nvidia-container-runtime]\nmode = "auto"\n')


def unit(name: str, state: str) -> str:
    load = "loaded" if state else "not-found"
    return f"Id={name}\nLoadState={load}\nActiveState={state or 'inactive'}\nStatusText="


def docker(fake: Fake) -> str:
    info = {
        "ServerVersion": fake.docker,
        "Runtimes": {name: {"path": name} for name in fake.runtimes},
        "DefaultRuntime": "runc",
        "CgroupDriver": fake.cgroup_driver,
        "CgroupVersion": fake.cgroup_version,
        "DockerRootDir": "/var/lib/docker",
        "CDISpecDirs": ["/etc/cdi", "/var/run/cdi"] if fake.cdi else [],
    }
    inspected = LINES(
        "|".join(
            (
                str(item.get("pid", 1000)), f"/{item['name']}", str(item.get("deployment", "")),
                str(item.get("pid_mode", "")), str(item.get("ipc_mode", "private")), str(item.get("runtime", "runc")),
                json.dumps(item.get("requests")),
            )
        )
        for item in fake.containers
    )  # fmt: skip
    ids = LINES(f"{index:012x}" for index, _ in enumerate(fake.containers))
    scripts = {
        "info": show(json.dumps(info) + "\n"),
        "ps": show(ids + "\n"),
        "inspect": show(inspected + "\n"),
        "image": "exit 1",
        "run": "exit 125",
    }
    if fake.image is not None:
        image = fake.image
        count = image.get("gpus", fake.gpus)
        listed = LINES(f"GPU {i}: {fake.gpu_name} (UUID: GPU-{i})" for i in range(count))
        versions = LINES(f"version {n} {v}" for n, v in image.get("versions", {}).items())
        about = LINES(
            [str(image.get("uid", 1000)), str(image.get("gid", 0)), image.get("memlock", "unlimited"), versions]
        )
        transports = LINES(f"#      Transport: {name}" for name in image.get("transports", ()))
        perf = "Final:                   100     1.2     2.3     3.4     {0}     {0}      10      10\n"
        inside = {
            "*perftest*": show(perf.format(image["perf_mb_s"])) if image.get("perf_mb_s") else "exit 1",
            "*ucx_info*": show(LINES([*image.get("complaints", ()), transports]) + "\n"),
            "*metadata*": show(about + "\n"),
            "*nvidia-smi*": (
                f"{show(image['gpu_error'])} >&2; exit 125" if image.get("gpu_error") else show(listed + "\n")
            ),
        }
        scripts["image"] = "echo sha256:0123"
        scripts["run"] = "for script; do :; done\n" + cases('"$script"', inside)
    return cases('"$1"', scripts)


def rdma(tree: Tree, fake: Fake) -> None:
    if fake.nics:
        tree.directory("sys/class/infiniband")
    for index in range(fake.nics):
        base = f"sys/class/infiniband/mlx5_{index}"
        netdev = f"ibp{index}s0" if fake.link_layer == "InfiniBand" else f"ens{index}np0"
        tree.file(f"{base}/device/numa_node", f"{nic_node(fake, index)}\n")
        tree.directory(f"{base}/device/net/{netdev}")
        port = f"{base}/ports/1"
        number = {"DOWN": 1, "INIT": 2, "ACTIVE": 4}[fake.nic_state]
        tree.file(f"{port}/state", f"{number}: {fake.nic_state}\n")
        tree.file(f"{port}/link_layer", f"{fake.link_layer}\n")
        tree.file(f"{port}/rate", "400 Gb/sec (4X NDR)\n")
        for gid, kind in enumerate(("IB/RoCE v1", "RoCE v2", "IB/RoCE v1", fake.gid_type)):
            prefix = "0000:0000:0000:0000:0000:ffff:0a00" if gid > 1 else "fe80:0000:0000:0000:a088:c203:00b1"
            tree.file(f"{port}/gids/{gid}", f"{prefix}:{index + 1:04x}\n")
            tree.file(f"{port}/gid_attrs/types/{gid}", f"{kind}\n")
        tree.file(f"{port}/gids/4", "0000:0000:0000:0000:0000:0000:0000:0000\n")
        if fake.uverbs:
            tree.file(f"dev/infiniband/uverbs{index}")
    tree.program("ofed_info", f"echo '{fake.ofed}:'" if fake.ofed else None)
    if fake.nics or fake.mlx5_core:
        tree.directory("sys/module/mlx5_core")
    if fake.mlx5_core:
        tree.file("sys/module/mlx5_core/version", fake.mlx5_core + "\n")
    if fake.peermem:
        tree.file("sys/module/nvidia_peermem/version", f"{fake.loaded}\n")
    if fake.nv_mem:
        tree.file("sys/kernel/mm/memory_peers/nv_mem/version", f"{fake.loaded}\n")
    if fake.gdrdrv:
        tree.file("dev/gdrdrv")
        tree.file("sys/module/gdrdrv/version", "2.5.1\n")


def network(tree: Tree, fake: Fake) -> None:
    lines = ["1: lo    inet 127.0.0.1/8 scope host lo\\       valid_lft forever preferred_lft forever"]
    tree.file("sys/class/net/lo/mtu", "65536\n")
    for index, (name, (address, mtu)) in enumerate(fake.interfaces.items(), start=2):
        tree.file(f"sys/class/net/{name}/mtu", f"{mtu}\n")
        tree.file(f"sys/class/net/{name}/operstate", "up\n")
        if address:
            lines.append(
                f"{index}: {name}    inet {address}/24 brd 10.0.0.255 scope global {name}\\       valid_lft forever"
            )
    tree.program("ip", show(LINES(lines) + "\n"))
    heading = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    rows = ""
    for index, entry in enumerate(fake.listeners):
        inode, pid = 7000 + index, int(entry.get("pid", 4000 + index))
        rows += (
            f"{index:4d}: {entry.get('hex', '00000000')}:{int(entry['port']):04X} 00000000:0000 0A 00000000:00000000 "
            f"00:00000000 00000000     0        0 {inode} 1 0000000000000000 100 0 0 10 0\n"
        )
        tree.file(f"proc/{pid}/comm", f"{entry.get('process', 'python3')}\n")
        tree.file(f"proc/{pid}/stat", f"{pid} ({entry.get('process', 'python3')}) S {entry.get('parent', 1)} 1 1 0\n")
        tree.directory(f"proc/{pid}/fd")
        at = tree.root / f"proc/{pid}/fd/{10 + index}"
        at.symlink_to(f"socket:[{inode}]")
    tree.file("proc/net/tcp", heading + rows)
    tree.file("proc/net/tcp6", heading)


def machine(tree: Tree, fake: Fake) -> None:
    values = {
        "net.ipv4.ip_local_port_range": "32768\t60999",
        "net.ipv4.ip_local_reserved_ports": "",
        "kernel.yama.ptrace_scope": "1",
        "kernel.numa_balancing": "0",
        "vm.max_map_count": "1048576",
        "vm.swappiness": "10",
    } | fake.sysctl
    for name, value in values.items():
        tree.file("proc/sys/" + name.replace(".", "/"), f"{value}\n")
    kib = fake.memory_mib * 1024
    tree.file("proc/meminfo", f"MemTotal:       {kib} kB\nMemFree:  1 kB\nMemAvailable:   {kib * 9 // 10} kB\n")
    tree.file("proc/cmdline", fake.cmdline + "\n")
    tree.directory("dev/shm")
    disk = (
        'size={0}; free={0}; [ "$2" = /dev/shm ] && size={1} free={1}\n'
        "echo 'Filesystem     1024-blocks      Used Available Capacity Mounted on'\n"
        'echo "/dev/nvme0n1p2  $size  0 $free       1% /"'
    )
    tree.program("df", disk.format(fake.disk_mib * 1024, fake.shm_mib * 1024))
    tree.program("dmesg", show(LINES(fake.kernel_log) + "\n"))
    leap = "Normal" if fake.synchronized else "Not synchronised"
    tracking = (
        f"A29FC87B,10.0.0.254,3,1763980000.1,{fake.offset_s},0.00001,0.0001,-1.2,0.0,0.01,0.01,0.001,64.0,{leap}\n"
    )
    tree.program("chronyc", None if fake.synchronized is None else show(tracking))
    tree.program("timedatectl", None)


def main(arguments: Sequence[str]) -> int:
    """Make a tree from `NAME=VALUE` words."""
    import yaml

    root, *words = arguments
    known = {entry.name for entry in fields(Fake)}
    what = {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in words)}
    if unknown := sorted(set(what) - known):
        raise SystemExit(f"fakehost: no {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    print(os.fspath(make(root, **what)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
