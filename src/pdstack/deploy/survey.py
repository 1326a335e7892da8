"""Reads, on a host, who listens on which TCP port and how much memory and disk is free; prints JSON.

    python3 survey.py PATH...        PATH: directories whose file system's free space is asked (they need not exist)

Standard library only, and in one file: the playbooks feed it to the python3 of a host. It reads /proc, so it needs
neither `ss` nor `netstat`, and asks the container engine only to give a process its container's name.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

LISTEN = "0A"
MIB = 1024 * 1024
# One line a container; the label is empty for what is not of pdstack.
FORMAT = '{{.State.Pid}} {{.Name}} {{index .Config.Labels "pdstack.deployment"}}'


def address(text: str) -> str:
    """Return the address that /proc/net/tcp{,6} writes as hexadecimal words in the machine's byte order."""
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, packed)


def listening(table: str) -> dict[str, tuple[str, int]]:
    """Return socket inode -> (address, port) of the listening sockets in the text of /proc/net/tcp or tcp6."""
    found = {}
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 9 and fields[3] == LISTEN:
            local, _, port = fields[1].rpartition(":")
            found[fields[9]] = (address(local), int(port, 16))
    return found


def owners(proc: Path) -> dict[str, int]:
    """Return socket inode -> pid, for the processes this user may look into."""
    found: dict[str, int] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                for descriptor in (entry / "fd").iterdir():
                    with contextlib.suppress(OSError):
                        target = str(descriptor.readlink())
                        if target.startswith("socket:["):
                            found.setdefault(target[8:-1], int(entry.name))
    return found


def command(proc: Path, pid: int) -> str:
    """Return the short name of a process, empty when it is gone."""
    try:
        return (proc / str(pid) / "comm").read_text().strip()
    except OSError:
        return ""


def ancestors(proc: Path, pid: int) -> list[int]:
    """Return `pid` and its parents, nearest first."""
    chain = []
    while pid > 1 and pid not in chain:
        chain.append(pid)
        try:
            status = (proc / str(pid) / "stat").read_text()
        except OSError:
            break
        # The name stands in brackets and may hold blanks.
        pid = int(status.rpartition(")")[2].split()[1])
    return chain


def containers() -> dict[int, tuple[str, str]]:
    """Return first pid -> (name, deployment) of each running container; empty without an engine."""
    if not shutil.which("docker"):
        return {}
    listed = subprocess.run(["docker", "ps", "-q"], capture_output=True, text=True, check=False)
    if not listed.stdout.split():
        return {}
    shown = subprocess.run(
        ["docker", "inspect", "--format", FORMAT, *listed.stdout.split()],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = {}
    for line in shown.stdout.splitlines():
        pid, name, deployment = line.split(" ", 2)
        found[int(pid)] = (name.lstrip("/"), deployment)
    return found


def memory(meminfo: str) -> dict[str, int]:
    """Return total and available MiB out of the text of /proc/meminfo."""
    values = {line.split(":")[0]: int(line.split()[1]) // 1024 for line in meminfo.splitlines() if ":" in line}
    return {"total_mib": values["MemTotal"], "available_mib": values["MemAvailable"]}


def free_disk(path: Path) -> int:
    """Return the free MiB of the file system that `path` lies on, or would lie on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free // MIB


def survey(paths: list[str], proc: Path = Path("/proc")) -> dict[str, Any]:
    """Return listeners (with process and container), memory, free disk by path, and the running containers."""
    sockets: dict[str, tuple[str, int]] = {}
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            sockets |= listening((proc / "net" / table).read_text())
    owner, running = owners(proc), containers()
    listeners = []
    for inode, (where, port) in sorted(sockets.items(), key=lambda entry: entry[1][1]):
        pid = owner.get(inode, 0)
        nobody = ("", "")
        container, deployment = next((running[above] for above in ancestors(proc, pid) if above in running), nobody)
        listeners.append(
            {
                "address": where,
                "port": port,
                "pid": pid,
                "process": command(proc, pid) if pid else "",
                "container": container,
                "deployment": deployment,
            }
        )
    return {
        "listeners": listeners,
        "memory": memory((proc / "meminfo").read_text()),
        "disk_mib": {path: free_disk(Path(path)) for path in paths},
        "present": {path: Path(path).exists() for path in paths},
        "containers": sorted(name for name, _ in running.values()),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(survey(sys.argv[1:])) + "\n")
