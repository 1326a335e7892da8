"""Reads the facts of a GPU host and prints them as JSON. Changes nothing, needs no root, never fails.

    python3 probe.py [--root R] [--path DIR]... [--reach HOST:PORT]... [--etcd URL]... [--nats URL]...
                     [--image REF [--run-option OPTION]... [--image-env NAME=VALUE]... [--perf]]

Standard library only, in one file, for Python >= 3.6: the playbooks feed it to the python3 of a host. What cannot be
read is null. Facts come from files (/sys, /proc, the package database); each program that must run has a time limit.
`--root R` reads R/sys, R/proc, R/etc, ... instead and takes programs from R/usr/bin and its like first: a tree of files
is a host. A file there that may not be executed says that the host lacks the program of that name.
Only `--image` starts something: short-lived containers of an image that the host has, removed when they end.
"""

# The hosts' Python may be 3.6: pyproject.toml excuses this file from the rules that ask for newer syntax.

import argparse
import functools
import glob
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

MIB = 1024 * 1024
LISTEN = "0A"
SIOCGIFADDR = 0x8915
NVIDIA = "0x10de"
MELLANOX = "0x15b3"
OPEN_MODULE = "Open Kernel Module"
SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
# Class codes of PCI: VGA and 3D controllers, NVSwitch (a bridge of another kind), network and InfiniBand, PCI bridges.
GPU_CLASSES = ("0x0300", "0x0302")
NVSWITCH_CLASS = "0x0680"
NIC_CLASSES = ("0x0200", "0x0207")
BRIDGE_CLASS = "0x0604"
ACS_CAPABILITY = 0x000D
PACKAGES = re.compile(
    r"(lib)?(nvidia|cuda|docker|containerd|rdma|mlnx|doca|gdr|ibverbs|nccl|nvlsm|nvsdm)|nv-persistence|moby|podman-docker"
    r"|linux-modules-nvidia|datacenter-gpu-manager|unattended-upgrades|chrony|systemd-timesyncd|glx-alternative"
)
SYSCTL = (
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.core.rmem_max",
    "net.core.wmem_max",
    "net.core.somaxconn",
    "kernel.yama.ptrace_scope",
    "kernel.numa_balancing",
    "vm.max_map_count",
    "vm.swappiness",
)
UNITS = ("docker.service", "nvidia-fabricmanager.service", "nvidia-persistenced.service", "nvidia-cdi-refresh.path")
UNIT_PROPERTIES = "Id,LoadState,ActiveState,StatusText,LimitMEMLOCK,LimitNOFILE,ExecStart"
SMI_FIELDS = (
    "index", "uuid", "name", "memory.total", "persistence_mode", "ecc.errors.uncorrected.volatile.total",
    "compute_mode", "mig.mode.current", "pci.bus_id",
)  # fmt: skip
SMI_FABRIC_FIELDS = ("fabric.state", "fabric.status")
KERNEL_LOG = re.compile(r"Xid|NVRM: .*(fail|error|mismatch)|mlx5.*(error|fail)", re.IGNORECASE)
LOG_LINES = 50
LIBRARIES = (
    "/usr/lib/*-linux-gnu",
    "/usr/lib64",
    "/usr/lib/*-linux-gnu/nvidia/current",
    "/usr/local/nvidia/lib64",
)
MATRIX_NAME = re.compile(r"(GPU|NIC)\d+$|mlx5_")
# One line a container; the first label is empty for what is not of pdstack.
CONTAINER_FORMAT = (
    '{{.State.Pid}}|{{.Name}}|{{index .Config.Labels "pdstack.deployment"}}|{{.HostConfig.PidMode}}|'
    "{{.HostConfig.IpcMode}}|{{.HostConfig.Runtime}}|{{json .HostConfig.DeviceRequests}}"
)
# The image's environment has no pip.
IMAGE_VERSIONS = """
from importlib import metadata
for name in ("ai-dynamo", "tensorrt-llm", "nixl", "nixl-cu12", "nixl-cu13"):
    try:
        print("version", name, metadata.version(name))
    except metadata.PackageNotFoundError:
        pass
"""
Facts = Dict[str, Any]


class Host:
    """The host whose root directory is `root`: its files and its programs."""

    def __init__(self, root: str = "/") -> None:
        self.root = root.rstrip("/")
        places = ("usr/local/sbin", "usr/local/bin", "usr/sbin", "usr/bin", "sbin", "bin")
        self.places = [os.path.join(self.root, place) for place in places] if self.root else []
        self.search = [*os.environ.get("PATH", os.defpath).split(os.pathsep), "/usr/sbin", "/sbin"]

    def path(self, path: str) -> str:
        """Return where `path` of the host lies here."""
        return self.root + path

    def exists(self, path: str) -> bool:
        """Say whether `path` exists on the host."""
        return os.path.exists(self.path(path))

    def read(self, path: str) -> Optional[str]:
        """Return the stripped text of a file, None if it cannot be read."""
        data = self.read_bytes(path)
        return None if data is None else data.decode("utf-8", "replace").strip()

    def read_bytes(self, path: str) -> Optional[bytes]:
        """Return the bytes of a file, None if it cannot be read."""
        try:
            with open(self.path(path), "rb") as file:
                return file.read()
        except (OSError, ValueError):
            return None

    def names(self, path: str) -> List[str]:
        """Return the sorted names in a directory, none if it cannot be read."""
        try:
            return sorted(os.listdir(self.path(path)))
        except OSError:
            return []

    def glob(self, pattern: str) -> List[str]:
        """Return the sorted paths of the host that match."""
        return sorted(found[len(self.root) :] for found in glob.glob(self.path(pattern)))

    def program(self, name: str) -> Optional[str]:
        """Return the path of a program of the host, None if there is none."""
        for place in self.places:
            found = os.path.join(place, name)
            if os.path.isfile(found):
                return found if os.access(found, os.X_OK) else None
        for place in self.search:
            found = os.path.join(place, name)
            if os.path.isfile(found) and os.access(found, os.X_OK):
                return found
        return None

    def run(self, *argv: str, timeout_s: float = 10.0) -> Optional[Tuple[int, str, str]]:
        """Return status, output and errors of a program; None if the host lacks it; 124 if it did not end in time."""
        found = self.program(argv[0])
        if found is None:
            return None
        environment = dict(os.environ, LC_ALL="C")
        try:
            process = subprocess.Popen(
                [found, *argv[1:]], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )  # fmt: skip
        except OSError:
            return None
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return 124, "", f"no answer within {timeout_s:g} s"
        return process.returncode, output.decode("utf-8", "replace"), errors.decode("utf-8", "replace")

    def output(self, *argv: str, timeout_s: float = 10.0) -> Optional[str]:
        """Return the output of a program without the last line end, None if the host lacks it or it failed."""
        done = self.run(*argv, timeout_s=timeout_s)
        return done[1].strip("\r\n") if done is not None and done[0] == 0 else None


def number(text: Optional[str]) -> Optional[int]:
    """Return the leading integer of a text, None without one."""
    found = re.match(r"\s*(-?\d+)", text or "")
    return int(found.group(1)) if found else None


def version_key(text: str) -> List[Tuple[int, int, str]]:
    """Return a key that sorts versions number by number."""
    parts = re.findall(r"\d+|[a-z]+", text.lower())
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def upstream(version: str) -> str:
    """Return a package's version without epoch and revision."""
    return re.sub(r"^\d+:", "", version).split("-")[0]


def os_facts(host: Host) -> Facts:
    """Return distribution, architecture and kernels; `virtual` says that a hypervisor is below."""
    release = {}
    for line in (host.read("/etc/os-release") or host.read("/usr/lib/os-release") or "").splitlines():
        key, _, value = line.partition("=")
        release[key.strip()] = value.strip().strip("\"'")
    machine = os.uname()
    kernel = host.read("/proc/sys/kernel/osrelease") or machine.release
    kernels = [name for name in host.names("/lib/modules") if host.exists("/lib/modules/" + name + "/modules.dep")]
    arch = host.read("/proc/sys/kernel/arch") or machine.machine
    return {
        "id": release.get("ID", ""),
        "version": release.get("VERSION_ID", ""),
        "like": release.get("ID_LIKE", ""),
        "codename": release.get("VERSION_CODENAME", ""),
        "arch": arch,
        "kernel": kernel,
        "newest_kernel": max(kernels, key=version_key) if kernels else None,
        "virtual": " hypervisor" in (host.read("/proc/cpuinfo") or ""),
        "dgx": host.exists("/etc/dgx-release"),
    }


def pci_facts(host: Host) -> Facts:
    """Return GPUs, NVSwitches and NVIDIA's network adapters, as the PCI bus lists them (no driver is needed)."""
    found = {"gpus": [], "nvswitches": [], "nics": []}  # type: Dict[str, List[Facts]]
    for address in host.names("/sys/bus/pci/devices"):
        base = "/sys/bus/pci/devices/" + address + "/"
        vendor = host.read(base + "vendor")
        if vendor not in (NVIDIA, MELLANOX):
            continue
        kind = (host.read(base + "class") or "")[:6]
        entry = {
            "address": address,
            "numa": number(host.read(base + "numa_node")),
            "device": host.read(base + "device"),
        }
        if vendor == NVIDIA and kind in GPU_CLASSES:
            found["gpus"].append(entry)
        elif vendor == NVIDIA and kind == NVSWITCH_CLASS:
            found["nvswitches"].append(entry)
        elif vendor == MELLANOX and kind in NIC_CLASSES:
            found["nics"].append(entry)
    return found


def acs_on(host: Host) -> Optional[int]:
    """Return how many PCI bridges check the source of requests (ACS); None if their registers cannot be read."""
    count, seen = 0, False
    for address in host.names("/sys/bus/pci/devices"):
        base = "/sys/bus/pci/devices/" + address
        if not (host.read(base + "/class") or "").startswith(BRIDGE_CLASS):
            continue
        config = host.read_bytes(base + "/config") or b""
        # Only root is shown more than the first 64 bytes; the capability lies beyond 256.
        if len(config) <= 0x100:
            continue
        seen = True
        at, visited = 0x100, set()  # type: int, set[int]
        while 0x100 <= at <= len(config) - 8 and at not in visited:
            visited.add(at)
            header = struct.unpack_from("<I", config, at)[0]
            if header & 0xFFFF == ACS_CAPABILITY:
                count += struct.unpack_from("<H", config, at + 6)[0] & 1
                break
            at = header >> 20
    return count if seen else None


def module_info(host: Host, name: str, kernel: str) -> Dict[str, str]:
    """Return the fields of a kernel module on disk, none if it is not there."""
    done = host.run("modinfo", "-k", kernel, name)
    if done is None or done[0] != 0:
        return {}
    fields = {}  # type: Dict[str, str]
    for line in done[1].splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def secure_boot(host: Host) -> Optional[bool]:
    """Say whether the firmware starts signed code only; None if it does not tell."""
    if host.exists("/sys/firmware") and not host.exists("/sys/firmware/efi"):
        return False
    variable = host.read_bytes(SECURE_BOOT)
    if variable:
        return variable[-1] == 1
    said = host.output("mokutil", "--sb-state")
    return None if said is None else "enabled" in said.lower()


def key_enrolled(host: Host) -> Optional[bool]:
    """Say whether the firmware knows the key that DKMS signs with; None if there is no such key or no answer."""
    key = "/var/lib/dkms/mok.pub"
    if not host.exists(key):
        return None
    done = host.run("mokutil", "--test-key", host.path(key))
    return None if done is None else "already enrolled" in done[1]


def smi_table(text: str, fields: Sequence[str]) -> List[Facts]:
    """Return a dict per GPU from the CSV of nvidia-smi; what it does not know is None."""
    rows = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(fields):
            continue
        row = dict(zip(fields, values))
        known = {key: None if re.match(r"\[?N/A|\[Not", value) else value for key, value in row.items()}
        rows.append(
            {
                "index": number(known["index"]),
                "uuid": known["uuid"],
                "name": known["name"],
                "memory_mib": number(known["memory.total"]),
                "persistence": known["persistence_mode"],
                "ecc": number(known["ecc.errors.uncorrected.volatile.total"]),
                "compute_mode": known["compute_mode"],
                "mig": known["mig.mode.current"],
                "bus_id": known["pci.bus_id"],
                "fabric_state": known.get("fabric.state"),
                "fabric_status": known.get("fabric.status"),
            }
        )
    return rows


def topology_matrix(text: str) -> Dict[str, Dict[str, str]]:
    """Return row -> column -> connection (NV18, PIX, SYS, OK, ...) of the matrices that `nvidia-smi topo` prints."""
    columns = []  # type: List[str]
    found = {}  # type: Dict[str, Dict[str, str]]
    for raw in text.splitlines():
        # The heading is underlined with escape codes.
        cells = [cell.strip() for cell in re.sub(r"\x1b\[\d*m", "", raw).split("\t")]
        row, values = cells[0], [cell for cell in cells[1:] if cell]
        if not columns and not row and values and values[0].startswith("GPU"):
            columns = [cell for cell in values if MATRIX_NAME.match(cell)]
        elif columns and MATRIX_NAME.match(row):
            found[row] = dict(zip(columns, values))
    return found


def smi_facts(host: Host, switches: bool) -> Facts:
    """Return what nvidia-smi says: its status, its text when it fails, a dict per GPU and how they are connected."""
    fields = SMI_FIELDS + (SMI_FABRIC_FIELDS if switches else ())
    done = query(host, fields)
    if switches and done is not None and done[0] != 0 and "not a valid field" in done[1]:
        fields = SMI_FIELDS
        done = query(host, fields)
    if done is None:
        return {"rc": None, "text": "", "gpus": [], "topology": {}, "nics": {}, "p2p": {}}
    status, output, errors = done
    found = {"rc": status, "text": "", "gpus": [], "topology": {}, "nics": {}, "p2p": {}}  # type: Facts
    if status != 0:
        found["text"] = (output + errors).strip()
        return found
    found["gpus"] = smi_table(output, fields)
    if len(found["gpus"]) > 1 or host.names("/sys/class/infiniband"):
        matrix = host.output("nvidia-smi", "topo", "-m", timeout_s=20.0) or ""
        found["topology"] = topology_matrix(matrix)
        found["nics"] = dict(re.findall(r"^\s*(NIC\d+): (\S+)", matrix, re.MULTILINE))
    if len(found["gpus"]) > 1:
        found["p2p"] = topology_matrix(host.output("nvidia-smi", "topo", "-p2p", "r", timeout_s=20.0) or "")
    return found


def query(host: Host, fields: Sequence[str]) -> Optional[Tuple[int, str, str]]:
    """Ask nvidia-smi for fields of all GPUs."""
    wanted = "--query-gpu=" + ",".join(fields)
    return host.run("nvidia-smi", wanted, "--format=csv,noheader,nounits", timeout_s=25.0)


def library_versions(host: Host) -> List[str]:
    """Return the versions of libnvidia-ml where distributions put it, else where the loader finds it."""
    paths = [path for place in LIBRARIES for path in host.glob(place + "/libnvidia-ml.so.*.*")]
    if not paths:
        known = re.findall(r"libnvidia-ml\.so\.1 .*=> (\S+)", host.output("ldconfig", "-p") or "")
        paths = [os.path.realpath(host.path(path)) for path in known]
    return [path.rpartition(".so.")[2] for path in paths if re.search(r"\.so\.\d+\.\d", path)]


def driver_facts(host: Host, kernel: str) -> Facts:
    """Return the three versions of the driver, its flavour, and what may keep it from loading."""
    about = host.read("/proc/driver/nvidia/version")
    info = module_info(host, "nvidia", kernel)
    libraries = library_versions(host)
    flavour = ""
    if about is not None:
        flavour = "open" if OPEN_MODULE in about else "proprietary"
    elif info:
        flavour = "open" if "MIT" in info.get("license", "") else "proprietary"
    dkms = host.output("dkms", "status") if host.exists("/var/lib/dkms") else None
    return {
        "loaded": host.read("/sys/module/nvidia/version"),
        "on_disk": info.get("version"),
        "library": max(libraries, key=version_key) if libraries else None,
        "flavour": flavour,
        "nouveau": host.exists("/sys/module/nouveau"),
        "signer": info.get("signer"),
        "secure_boot": secure_boot(host),
        "key_enrolled": key_enrolled(host),
        "dkms": [line for line in (dkms or "").splitlines() if line],
        "headers": host.exists("/lib/modules/" + kernel + "/build/Makefile"),
    }


def dpkg_packages(status: str) -> Tuple[Dict[str, str], List[str]]:
    """Return installed name -> version and the packages on hold, from the text of dpkg's database."""
    installed, holds = {}, []
    for paragraph in status.split("\n\n"):
        head = paragraph.partition("\n")[0]
        if not head.startswith("Package: ") or not PACKAGES.match(head[9:]):
            continue
        state = re.search(r"^Status: (\S+) \S+ (\S+)", paragraph, re.MULTILINE)
        version = re.search(r"^Version: (\S+)", paragraph, re.MULTILINE)
        if state and version and state.group(2) == "installed":
            installed[head[9:]] = version.group(1)
            if state.group(1) == "hold":
                holds.append(head[9:])
    return installed, holds


def apt_blacklist(text: str) -> List[str]:
    """Return the patterns that unattended-upgrades leaves alone, from the text of apt's configuration."""
    text = re.sub(r"^\s*(//|#).*$", "", text, flags=re.MULTILINE)
    found = []  # type: List[str]
    for block in re.findall(r"Unattended-Upgrade::Package-Blacklist\s*\{(.*?)\}", text, re.DOTALL):
        found += re.findall(r'"([^"]+)"', block)
    return found + re.findall(r'Unattended-Upgrade::Package-Blacklist::\s*"([^"]+)"', text)


def package_sources(host: Host) -> List[str]:
    """Return the package sources as `file: address ...`, without names and passwords."""
    found = []
    for path in host.glob("/etc/apt/sources.list") + host.glob("/etc/apt/sources.list.d/*"):
        for line in (host.read(path) or "").splitlines():
            if re.match(r"\s*(deb\s|URIs:)", line) and path.endswith((".list", ".sources")):
                found.append(path + ": " + " ".join(line.split()))
    for path in host.glob("/etc/yum.repos.d/*.repo"):
        for line in (host.read(path) or "").splitlines():
            if re.match(r"\s*(baseurl|mirrorlist|metalink)\s*=", line):
                found.append(path + ": " + line.strip())
    return [re.sub(r"//[^/@\s]+@", "//", line) for line in found]


def package_facts(host: Host) -> Facts:
    """Return the packages that matter here, and what keeps them from changing by themselves."""
    manager, installed, holds = "", {}, []  # type: str, Dict[str, str], List[str]
    status = host.read("/var/lib/dpkg/status")
    locks = host.read("/etc/dnf/plugins/versionlock.list") or ""
    if status is not None:
        manager = "apt"
        installed, holds = dpkg_packages(status)
    else:
        listed = host.output("rpm", "-qa", "--queryformat", "%{NAME} %{EPOCHNUM}:%{VERSION}-%{RELEASE}\\n")
        if listed is not None:
            manager = "dnf"
            pairs = [line.split(" ", 1) for line in listed.splitlines() if " " in line]
            installed = {name: re.sub(r"^0:", "", version) for name, version in pairs if PACKAGES.match(name)}
        holds = [line.strip() for line in locks.splitlines() if line.strip() and not line.startswith("#")]
    configuration = "\n".join(host.read(path) or "" for path in host.glob("/etc/apt/apt.conf.d/*"))
    preferences = [host.read(path) or "" for path in host.glob("/etc/apt/preferences.d/*")]
    pins = any(re.search(r"^\s*Package:.*nvidia", text, re.MULTILINE) for text in preferences)
    module = re.search(
        r"^\s*stream\s*=\s*(\S+)", host.read("/etc/dnf/modules.d/nvidia-driver.module") or "", re.MULTILINE
    )
    return {
        "manager": manager,
        "installed": installed,
        "holds": sorted(holds),
        "blacklist": apt_blacklist(configuration),
        "pin_file": pins
        or any(name.startswith("nvidia-driver-pinning") for name in installed)
        or "nvidia" in locks
        or module is not None,
        "module_stream": module.group(1) if module else "",
        "run_file_install": host.exists("/usr/bin/nvidia-uninstall"),
        "sources": package_sources(host),
    }


def unit_facts(host: Host) -> Dict[str, Dict[str, str]]:
    """Return unit -> property -> value of the services that matter here."""
    done = host.run("systemctl", "show", "--property=" + UNIT_PROPERTIES, *UNITS)
    found = {}
    for block in (done[1] if done is not None and done[0] == 0 else "").split("\n\n"):
        pairs = [line.partition("=") for line in block.splitlines() if "=" in line]
        values = {key: value for key, _, value in pairs}
        if values.get("LoadState") == "loaded" and "Id" in values:
            found[values["Id"]] = values
    return found


def dockerd_flags(exec_start: str) -> List[str]:
    """Return the names of the options on dockerd's command line, from systemd's ExecStart."""
    command = re.search(r"argv\[\]=(.*?) ;", exec_start)
    words = (command.group(1) if command else exec_start).split()[1:]
    return [word.split("=")[0] for word in words if word.startswith("-")]


def daemon_json(host: Host) -> Tuple[Optional[Facts], str]:
    """Return the content of daemon.json (None if there is none or it is broken) and what is wrong with it."""
    text = host.read("/etc/docker/daemon.json") or ""
    # An empty file says as little as none, and is filled in like one.
    if not text.strip():
        return None, ""
    try:
        content = json.loads(text)
    except ValueError as error:
        return None, str(error)
    if not isinstance(content, dict):
        return None, "it is no JSON object"
    return content, ""


def docker_info(host: Host) -> Facts:
    """Return what the Docker daemon says of itself; empty if it does not answer."""
    done = host.run("docker", "info", "--format", "{{json .}}", timeout_s=15.0)
    try:
        said = json.loads(done[1]) if done is not None else {}
    except ValueError:
        return {}
    return said if isinstance(said, dict) and said.get("ServerVersion") else {}


def running_containers(host: Host) -> List[Facts]:
    """Return the running containers; none without an engine."""
    listed = (host.output("docker", "ps", "--quiet") or "").split()
    if not listed:
        return []
    found = []
    done = host.run("docker", "inspect", "--format", CONTAINER_FORMAT, *listed, timeout_s=15.0)
    for line in (done[1] if done is not None else "").splitlines():
        fields = line.split("|", 6)
        if len(fields) == 7 and fields[0].isdigit():
            found.append(
                {
                    "pid": int(fields[0]),
                    "name": fields[1].lstrip("/"),
                    "deployment": fields[2] if fields[2] != "<no value>" else "",
                    "pid_mode": fields[3],
                    "ipc_mode": fields[4],
                    "runtime": fields[5],
                    "cdi": "nvidia.com/gpu" in fields[6],
                    "gpus": '"gpu"' in fields[6] or "nvidia.com/gpu" in fields[6] or fields[5] == "nvidia",
                }
            )
    return sorted(found, key=lambda entry: str(entry["name"]))


def docker_facts(host: Host, units: Dict[str, Dict[str, str]]) -> Facts:
    """Return the engine's version, runtimes, cgroups, configuration and running containers."""
    info = docker_info(host)
    content, error = daemon_json(host)
    unified = host.exists("/sys/fs/cgroup/cgroup.controllers")
    flags = dockerd_flags(units.get("docker.service", {}).get("ExecStart", ""))
    spec_dirs = info.get("CDISpecDirs")
    return {
        "installed": host.program("docker") is not None,
        "version": info.get("ServerVersion"),
        "runtimes": sorted(info.get("Runtimes") or {}),
        "default_runtime": info.get("DefaultRuntime", ""),
        "cgroup_driver": info.get("CgroupDriver", ""),
        "cgroup_version": info.get("CgroupVersion")
        or ("2" if unified else "1" if host.exists("/sys/fs/cgroup") else ""),
        "daemon_json": content,
        "daemon_json_error": error,
        "unit_flags": flags,
        # Docker names the directories only where CDI is on.
        "cdi": bool(spec_dirs),
        "data_root": info.get("DockerRootDir") or "/var/lib/docker",
        "containers": running_containers(host) if info else [],
    }


def cdi_devices(host: Host) -> List[str]:
    """Return the CDI devices that NVIDIA's toolkit lists."""
    listed = host.output("nvidia-ctk", "cdi", "list") or ""
    return [line.strip() for line in listed.splitlines() if line.strip().startswith("nvidia.com/")]


def toolkit_facts(host: Host, installed: Dict[str, str], loaded: Optional[str]) -> Facts:
    """Return the container toolkit's versions, mode, and whether a CDI file of another driver lies about."""
    said = host.output("nvidia-ctk", "--version") or ""
    version = re.search(r"version (\d\S*)", said)
    names = (
        "nvidia-container-toolkit",
        "nvidia-container-toolkit-base",
        "libnvidia-container-tools",
        "libnvidia-container1",
    )
    written = host.read("/etc/cdi/nvidia.yaml")
    refreshed = host.exists("/var/run/cdi/nvidia.yaml") or host.exists("/run/cdi/nvidia.yaml")
    stale = False
    if written is not None:
        versions = set(re.findall(r"\.so\.(\d{3}\.\d+(?:\.\d+)?)", written))
        stale = refreshed or bool(loaded and versions and loaded not in versions)
    runtime = host.read("/etc/nvidia-container-runtime/config.toml") or ""
    mode = re.search(r'^\s*mode\s*=\s*"(\w+)"', runtime, re.MULTILINE)
    return {
        "version": version.group(1) if version else None,
        "packages": {name: installed[name] for name in names if name in installed},
        "stale_cdi": stale,
        "mode": mode.group(1) if mode else "",
        "no_cgroups": re.search(r"^\s*no-cgroups\s*=\s*true", runtime, re.MULTILINE) is not None,
    }


def fabric_manager_facts(units: Dict[str, Dict[str, str]], installed: Dict[str, str]) -> Facts:
    """Return unit, version and state of the fabric manager."""
    unit = units.get("nvidia-fabricmanager.service", {})
    versions = [
        upstream(value) for name, value in installed.items() if re.match(r"nvidia-fabric-?manager(-\d+)?$", name)
    ]
    return {
        "unit": unit.get("Id", ""),
        "version": max(versions, key=version_key) if versions else None,
        "state": unit.get("ActiveState", ""),
        "status": unit.get("StatusText", ""),
    }


def rdma_ports(host: Host) -> List[Facts]:
    """Return a dict per port of each RDMA device; only addresses (GIDs) that are set are listed."""
    found = []
    for name in host.names("/sys/class/infiniband"):
        base = "/sys/class/infiniband/" + name
        netdevs = host.names(base + "/device/net")
        for port in host.names(base + "/ports"):
            at = base + "/ports/" + port
            gids = {}
            for index in host.names(at + "/gids"):
                gid = host.read(at + "/gids/" + index)
                if gid and gid.strip("0:"):
                    gids[index] = {"gid": gid, "type": host.read(at + "/gid_attrs/types/" + index) or ""}
            found.append(
                {
                    "name": name,
                    "port": number(port),
                    "state": (host.read(at + "/state") or "").partition(": ")[2],
                    "link_layer": host.read(at + "/link_layer") or "",
                    "netdev": netdevs[0] if netdevs else "",
                    "numa": number(host.read(base + "/device/numa_node")),
                    "rate": host.read(at + "/rate") or "",
                    "gids": gids,
                }
            )
    return found


def rdma_facts(host: Host, kernel: str, flavour: str) -> Facts:
    """Return the RDMA devices, whose drivers they run, and the ways GPU memory can be registered with them."""
    numbers = [int(part) for part in re.findall(r"\d+", kernel)[:2]]
    info = module_info(host, "mlx5_core", kernel) if host.exists("/sys/module/mlx5_core") else {}
    return {
        "devices": rdma_ports(host),
        "ofed": (host.output("ofed_info", "-s") or "").rstrip(":"),
        "mlx5_core": host.read("/sys/module/mlx5_core/version"),
        "mlx5_core_on_disk": info.get("version"),
        "peermem": host.exists("/sys/module/nvidia_peermem"),
        "nv_mem": host.exists("/sys/kernel/mm/memory_peers/nv_mem/version"),
        "dmabuf": flavour == "open" and numbers >= [5, 12],
        "uverbs": bool(host.glob("/dev/infiniband/uverbs*")),
    }


def link_addresses(text: str) -> Dict[str, List[str]]:
    """Return interface -> addresses, from `ip -o addr`."""
    found = {}  # type: Dict[str, List[str]]
    for line in text.splitlines():
        fields = line.split()
        if len(fields) > 3 and fields[2] in ("inet", "inet6"):
            found.setdefault(fields[1], []).append(fields[3].split("/")[0])
    return found


def kernel_address(host: Host, name: str) -> Optional[List[str]]:
    """Return an interface's first IPv4 address as the kernel tells it (hosts without `ip`); None for a fake root."""
    if host.root:
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            said = fcntl.ioctl(asked.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return []
    return [socket.inet_ntoa(said[20:24])]


def interface_facts(host: Host) -> List[Facts]:
    """Return the network interfaces; `addresses` is null where the host cannot say."""
    said = host.output("ip", "-o", "addr")
    addresses = link_addresses(said or "")
    return [
        {
            "name": name,
            "mtu": number(host.read("/sys/class/net/" + name + "/mtu")),
            "state": host.read("/sys/class/net/" + name + "/operstate") or "",
            "addresses": addresses.get(name, []) if said is not None else kernel_address(host, name),
        }
        for name in host.names("/sys/class/net")
        if host.exists("/sys/class/net/" + name + "/mtu")
    ]


def address(text: str) -> str:
    """Return the address that /proc/net/tcp{,6} writes as hexadecimal words in the machine's byte order."""
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, packed)


def listening(table: str) -> Dict[str, Tuple[str, int]]:
    """Return socket inode -> (address, port) of the listening sockets in the text of /proc/net/tcp or tcp6."""
    found = {}
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 9 and fields[3] == LISTEN:
            local, _, port = fields[1].rpartition(":")
            found[fields[9]] = (address(local), int(port, 16))
    return found


def socket_owners(host: Host, wanted: Iterable[str]) -> Dict[str, int]:
    """Return socket inode -> pid, for the processes this user may look into."""
    found, left = {}, set(wanted)
    for name in host.names("/proc"):
        if not left:
            break
        if not name.isdigit():
            continue
        base = "/proc/" + name + "/fd"
        for descriptor in host.names(base):
            try:
                target = os.readlink(host.path(base + "/" + descriptor))
            except OSError:
                continue
            if target.startswith("socket:[") and target[8:-1] in left:
                found[target[8:-1]] = int(name)
                left.discard(target[8:-1])
    return found


def ancestors(host: Host, pid: int) -> List[int]:
    """Return `pid` and its parents, nearest first."""
    chain = []  # type: List[int]
    while pid > 1 and pid not in chain:
        chain.append(pid)
        # The name stands in brackets and may hold blanks.
        status = (host.read(f"/proc/{pid}/stat") or "").rpartition(")")[2].split()
        pid = int(status[1]) if len(status) > 1 else 0
    return chain


def listener_facts(host: Host, containers: List[Facts]) -> List[Facts]:
    """Return who listens on which TCP port: process, container and its deployment."""
    sockets = {}  # type: Dict[str, Tuple[str, int]]
    for table in ("tcp", "tcp6"):
        sockets.update(listening(host.read("/proc/net/" + table) or ""))
    owner = socket_owners(host, sockets)
    running = {entry["pid"]: entry for entry in containers}
    found = []
    for inode, (where, port) in sorted(sockets.items(), key=lambda entry: (entry[1][1], entry[1][0])):
        pid = owner.get(inode, 0)
        inside = next((running[above] for above in ancestors(host, pid) if above in running), {})
        found.append(
            {
                "address": where,
                "port": port,
                "pid": pid,
                "process": host.read(f"/proc/{pid}/comm") or "" if pid else "",
                "container": inside.get("name", ""),
                "deployment": inside.get("deployment", ""),
            }
        )
    return found


def memory_facts(host: Host) -> Facts:
    """Return total and available memory in MiB, null if /proc does not tell."""
    text = host.read("/proc/meminfo") or ""
    found = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+)", text, re.MULTILINE))
    kib = {key: int(value) // 1024 for key, value in found.items()}
    return {"total_mib": kib.get("MemTotal"), "available_mib": kib.get("MemAvailable")}


def file_system(host: Host, path: str) -> Tuple[Optional[int], Optional[int]]:
    """Return size and free space in MiB of the file system that `path` lies on, or would lie on."""
    if host.root and host.program("df") in [os.path.join(place, "df") for place in host.places]:
        lines = (host.output("df", "-Pk", path) or "").splitlines()
        fields = lines[-1].split() if len(lines) > 1 else []
        return (int(fields[1]) // 1024, int(fields[3]) // 1024) if len(fields) > 3 else (None, None)
    while not host.exists(path) and path not in ("", "/"):
        path = os.path.dirname(path)
    try:
        about = os.statvfs(host.path(path) or "/")
    except OSError:
        return None, None
    return about.f_blocks * about.f_frsize // MIB, about.f_bavail * about.f_frsize // MIB


def path_facts(host: Host, path: str) -> Facts:
    """Return whether a directory exists, whose it is, and its mode with those of the files in it."""
    try:
        about = os.stat(host.path(path))
    except OSError:
        return {"exists": False, "uid": None, "gid": None, "mode": None, "files": []}
    files = []
    for name in host.names(path)[:200]:
        try:
            entry = os.stat(host.path(path + "/" + name))
        except OSError:
            continue
        files.append({"name": name, "uid": entry.st_uid, "gid": entry.st_gid, "mode": entry.st_mode & 0o7777})
    return {"exists": True, "uid": about.st_uid, "gid": about.st_gid, "mode": about.st_mode & 0o7777, "files": files}


def time_facts(host: Host) -> Facts:
    """Return whether the clock follows a time server, and its offset in seconds where chrony runs."""
    tracking = (host.output("chronyc", "-n", "-c", "tracking", timeout_s=5.0) or "").split(",")
    if len(tracking) > 13:
        return {"synchronized": tracking[13] != "Not synchronised", "offset_s": abs(float(tracking[4]))}
    if host.exists("/run/systemd/timesync/synchronized"):
        return {"synchronized": True, "offset_s": None}
    said = host.output("timedatectl", "show", "--property=NTPSynchronized", "--value", timeout_s=5.0)
    return {"synchronized": None if not said else said == "yes", "offset_s": None}


def kernel_log(host: Host) -> Optional[List[str]]:
    """Return the kernel's complaints about GPUs and network adapters since boot; None if it may not be read."""
    text = host.output("dmesg", timeout_s=5.0)
    return None if text is None else [line for line in text.splitlines() if KERNEL_LOG.search(line)][-LOG_LINES:]


def reach(target: str) -> str:
    """Return `ok`, `refused` (the host is there, nobody listens) or why HOST:PORT cannot be reached."""
    name, _, port = target.rpartition(":")
    try:
        with socket.create_connection((name.strip("[]"), int(port)), timeout=3.0):
            return "ok"
    except ConnectionRefusedError:
        return "refused"
    except socket.timeout:
        return "no answer within 3 s"
    except (OSError, ValueError) as error:
        return str(error)


def http_get(url: str, body: Optional[bytes] = None) -> Tuple[int, str]:
    """Return status and text of an HTTP answer; status 0 with the reason if there is none."""
    import urllib.error
    import urllib.request

    # The hosts of a deployment are asked, never a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, data=body), timeout=3.0) as answer:  # noqa: S310 - as the caller says
            return answer.status, answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8", "replace")
    except (OSError, ValueError) as error:
        return 0, str(getattr(error, "reason", error))


def histogram_p99(metrics: str, name: str) -> Optional[float]:
    """Return the bucket below which 99 % of a histogram's observations lie; None without observations."""
    pattern = r"^" + re.escape(name) + r'_bucket\{.*?le="([^"]+)"\} (\S+)'
    buckets = [(float(bound), float(count)) for bound, count in re.findall(pattern, metrics, re.MULTILINE)]
    total = max((count for _, count in buckets), default=0.0)
    return next((bound for bound, count in sorted(buckets) if total and count >= 0.99 * total), None)


def etcd_facts(url: str) -> Facts:
    """Return an etcd member's health, whether it may be read, and its slowest 1 % of flushes to disk in seconds."""
    status, text = http_get(url + "/health")
    healthy = status == 200 and '"true"' in text.replace(" ", "")
    readable, detail = None, ""  # type: Optional[bool], str
    if healthy:
        # The keys of Dynamo begin with "v1/": base64 of that, and of the first key behind them.
        code, detail = http_get(url + "/v3/kv/range", b'{"key": "djEv", "range_end": "djEw", "count_only": true}')
        readable = code == 200
    _, metrics = http_get(url + "/metrics") if healthy else (0, "")
    return {
        "healthy": healthy,
        "error": "" if healthy else text.strip()[:200] or f"status {status}",
        "readable": readable,
        "read_error": "" if readable is not False else detail.strip()[:200],
        "fsync_p99_s": histogram_p99(metrics, "etcd_disk_wal_fsync_duration_seconds"),
    }


def nats_facts(url: str) -> Facts:
    """Return what a NATS server says before anyone logs in: whether it wants TLS and a login, and JetStream."""
    place = re.sub(r"^nats://", "", url)
    name, _, port = place.rpartition(":")
    try:
        with socket.create_connection((name.strip("[]"), int(port)), timeout=3.0) as connection:
            connection.settimeout(3.0)
            line = connection.makefile("rb").readline().decode("utf-8", "replace")
        said = json.loads(line[len("INFO ") :]) if line.startswith("INFO ") else {}
    except (OSError, ValueError) as error:
        return {"answers": False, "error": str(error)[:200]}
    return {
        "answers": bool(said),
        "error": "" if said else "it does not speak NATS",
        "version": said.get("version", ""),
        "tls_required": bool(said.get("tls_required")),
        "auth_required": bool(said.get("auth_required")),
        "jetstream": bool(said.get("jetstream")),
        "max_payload": said.get("max_payload"),
    }


def image_facts(host: Host, options: argparse.Namespace) -> Facts:
    """Return what containers of the image see: GPUs, memlock, user, versions, UCX. They are removed when they end."""
    base = ["docker", "run", "--rm", "--pull=never", "--entrypoint", "sh", *options.run_option]
    for pair in options.image_env:
        base += ["--env", pair]

    def inside(script: str, timeout_s: float = 120.0) -> Facts:
        done = host.run(*base, options.image, "-c", script, timeout_s=timeout_s)
        if done is None:
            return {"rc": None, "text": "there is no docker", "output": ""}
        return {"rc": done[0], "output": done[1], "text": (done[1] + done[2]).strip()[-2000:]}

    present = host.output("docker", "image", "inspect", "--format", "{{.Id}}", options.image)
    if not present:
        return {"ref": options.image, "present": False}
    listed = inside("nvidia-smi -L")
    about = inside("id -u; id -g; ulimit -l; python3 -c '{}'".format(IMAGE_VERSIONS))
    lines = about["output"].splitlines()
    versions = re.findall(r"^version (\S+) (\S+)", about["output"], re.MULTILINE)
    # -d lists what there is; a context (-u) complains about what the environment asks for and is not there.
    ucx = inside("PATH=$PATH:/usr/local/ucx/bin; ucx_info -d && ucx_info -u r -e")
    transports = sorted(set(re.findall(r"Transport: (\S+)", ucx["output"])))
    wrong = re.compile(r"not available|unused environment variable")
    complaints = [line.strip() for line in ucx["text"].splitlines() if wrong.search(line)]
    # What ucx_info lists begins with #.
    said = "\n".join(line for line in ucx["text"].splitlines() if not line.startswith("#")) if ucx["rc"] != 0 else ""
    found = {
        "ref": options.image,
        "present": True,
        "id": present,
        "gpus": {"rc": listed["rc"], "count": len(re.findall(r"^GPU \d+", listed["output"], re.MULTILINE)),
                 "text": listed["text"]},
        "uid": number(lines[0]) if lines else None,
        "gid": number(lines[1]) if len(lines) > 1 else None,
        "memlock": lines[2].strip() if len(lines) > 2 else None,
        "versions": dict(versions),
        "ucx": {"rc": ucx["rc"], "transports": transports, "complaints": complaints, "text": said},
        "perf_mb_s": None,
        "perf_text": "",
    }  # type: Facts  # fmt: skip
    if options.perf:
        pair = (
            "export UCX_WARN_UNUSED_ENV_VARS=n PATH=$PATH:/usr/local/ucx/bin; "
            "ucx_perftest -p 13579 >/dev/null 2>&1 & sleep 1; "
            "ucx_perftest 127.0.0.1 -p 13579 -t tag_bw -m cuda -s 67108864 -n 100 -f"
        )
        measured = inside(pair)
        final = re.findall(r"^Final:\s+(.*)$", measured["output"], re.MULTILINE)
        fields = final[-1].split() if final else []
        # iterations, typical, average and overall overhead, average bandwidth, overall bandwidth, two message rates
        found["perf_mb_s"] = float(fields[5]) if len(fields) > 5 else None
        found["perf_text"] = "" if fields else measured["text"][-400:]
    return found


def together(jobs: Dict[str, Callable[[], Any]]) -> Facts:
    """Run functions at the same time and return their results by name; None for one that failed."""
    found = dict.fromkeys(jobs)  # type: Facts

    def work(name: str, job: Callable[[], Any]) -> None:
        try:
            found[name] = job()
        except Exception as error:  # one fact that cannot be read must not take the others with it
            found.setdefault("errors", []).append(f"{name}: {error!r}")

    threads = [threading.Thread(target=work, args=item, daemon=True) for item in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def probe(host: Host, options: argparse.Namespace) -> Facts:
    """Return all facts of the host; see the module's text."""
    about = os_facts(host)
    kernel = str(about["kernel"])
    pci = pci_facts(host)
    packages = package_facts(host)
    installed = packages["installed"]
    units = unit_facts(host)
    jobs = {
        "driver": lambda: driver_facts(host, kernel),
        "smi": lambda: smi_facts(host, bool(pci["nvswitches"])),
        "docker": lambda: docker_facts(host, units),
        "cdi": lambda: cdi_devices(host),
        "toolkit": lambda: toolkit_facts(host, installed, host.read("/sys/module/nvidia/version")),
        "interfaces": lambda: interface_facts(host),
        "time": lambda: time_facts(host),
        "kernel_log": lambda: kernel_log(host),
        "memory": lambda: memory_facts(host),
        "acs": lambda: acs_on(host),
    }  # type: Dict[str, Callable[[], Any]]
    for target in options.reach:
        jobs["reach " + target] = functools.partial(reach, target)
    for url in options.etcd:
        jobs["etcd " + url] = functools.partial(etcd_facts, url)
    for url in options.nats:
        jobs["nats " + url] = functools.partial(nats_facts, url)
    got = together(jobs)
    driver = got["driver"] or {}
    driver["nvidia_smi"] = got["smi"] or {"rc": None, "text": "", "gpus": [], "topology": {}, "nics": {}, "p2p": {}}
    docker = got["docker"] or {}
    docker["cdi_devices"] = got["cdi"] or []
    later = together(
        {
            "rdma": lambda: rdma_facts(host, kernel, str(driver.get("flavour"))),
            "listeners": lambda: listener_facts(host, docker.get("containers", [])),
            "image": lambda: image_facts(host, options) if options.image else None,
            "disk": lambda: {path: file_system(host, path)[1] for path in options.path},
            "paths": lambda: {path: path_facts(host, path) for path in options.path},
            "shm": lambda: file_system(host, "/dev/shm")[0] if host.exists("/dev/shm") else None,  # noqa: S108
        }
    )
    memlock = units.get("docker.service", {}).get("LimitMEMLOCK")
    pending = host.exists("/var/run/reboot-required") or host.exists("/run/reboot-required")
    if packages["manager"] == "dnf" and about["newest_kernel"]:
        pending = pending or about["newest_kernel"] != kernel
    return {
        "os": about,
        "pci": pci,
        "driver": driver,
        "packages": packages,
        "reboot_required": pending,
        "fabric_manager": fabric_manager_facts(units, installed),
        "persistenced": units.get("nvidia-persistenced.service", {}).get("ActiveState", ""),
        "docker": docker,
        "toolkit": got["toolkit"],
        "rdma": later["rdma"],
        "gdrcopy": {"device": host.exists("/dev/gdrdrv"), "module": host.read("/sys/module/gdrdrv/version")},
        "net": {"interfaces": got["interfaces"] or []},
        "listeners": later["listeners"] or [],
        "limits": {"memlock": number(memlock) if number(memlock) is not None else memlock,
                   "nofile": number(units.get("docker.service", {}).get("LimitNOFILE"))},
        "sysctl": {name: host.read("/proc/sys/" + name.replace(".", "/")) for name in SYSCTL},
        "shm_mib": later["shm"],
        "memory": got["memory"] or {"total_mib": None, "available_mib": None},
        "disk": later["disk"] or {},
        "paths": later["paths"] or {},
        "time": got["time"] or {"synchronized": None, "offset_s": None},
        "iommu": {"cmdline": host.read("/proc/cmdline") or "", "acs_on": got["acs"],
                  "groups": len(host.names("/sys/kernel/iommu_groups"))},
        "kernel_log": got["kernel_log"],
        "reach": {target: got["reach " + target] for target in options.reach},
        "etcd": {url: got["etcd " + url] for url in options.etcd},
        "nats": {url: got["nats " + url] for url in options.nats},
        "image": later["image"],
        "errors": got.get("errors", []) + later.get("errors", []),
    }  # fmt: skip


def parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Return the parser of the command line; without --help it can be the parent of another."""
    arguments = argparse.ArgumentParser(
        prog="probe.py", description="Print the facts of a GPU host as JSON.", add_help=add_help
    )
    arguments.add_argument("--root", default="/", help="read this tree instead of the host's own")
    arguments.add_argument("--path", action="append", default=[], help="directory whose free space is asked")
    arguments.add_argument("--reach", action="append", default=[], metavar="HOST:PORT", help="try to connect there")
    arguments.add_argument("--etcd", action="append", default=[], metavar="URL", help="ask this etcd member")
    arguments.add_argument("--nats", action="append", default=[], metavar="URL", help="ask this NATS server")
    arguments.add_argument("--image", default="", metavar="REF", help="run containers of this image")
    arguments.add_argument("--run-option", action="append", default=[], help="option of docker run for --image")
    arguments.add_argument("--image-env", action="append", default=[], metavar="NAME=VALUE", help="its environment")
    arguments.add_argument("--perf", action="store_true", help="with --image: measure a pair of UCX processes")
    return arguments


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Print the facts."""
    options = parser().parse_args(arguments)
    sys.stdout.write(json.dumps(probe(Host(options.root), options), sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
