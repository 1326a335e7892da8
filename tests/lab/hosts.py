"""The hosts of the lab: containers of this machine's engine that run systemd and, inside, an engine of their own.

Each has an address of its own on a network of its own, so that services, ports and the loss of a host are what they are
on separate machines. `inventories/lab` names the same hosts and addresses.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.molecule import hostimage

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "pdstack-lab"
NETWORK = "pdstack-lab"
SUBNET = "10.231.77.0/24"
# Hosts without an engine are light, and have names and addresses of their own beside the others.
BARE = "bare-"
MOST = {"": 5, BARE: 9}
FIRST = {"": 10, BARE: 100}
BOOT_S = 60
# What a host of the lab has before a deployment finds it: an engine, as on a site that installed Docker itself.
ENGINE_DOCKERFILE = """\
FROM {base}
RUN apt-get update --quiet=2 \\
 && DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends \\
    docker.io iptables debootstrap \\
 && apt-get clean
"""
# No --privileged: these are what systemd and a nested container engine need, and no more (as tests/molecule).
OPTIONS = (
    *("--cap-add", "SYS_ADMIN", "--cap-add", "NET_ADMIN", "--cap-add", "MKNOD", "--cap-add", "SYS_PTRACE"),
    *("--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined"),
    *("--cgroupns", "host", "--volume", "/sys/fs/cgroup:/sys/fs/cgroup:rw", "--volume", "/var/lib/docker"),
    *("--tmpfs", "/run", "--tmpfs", "/tmp:exec"),
)


def docker(*arguments: str, check: bool = True) -> str:
    """Run docker and return what it prints; RuntimeError with what it complains about when it fails."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"docker {' '.join(arguments[:3])}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def name(number: int, kind: str = "") -> str:
    """Return the container of host `number` (from 1)."""
    return f"{PREFIX}-{kind}{number}"


def address(number: int, kind: str = "") -> str:
    """Return the address of host `number`, as `inventories/lab` and tests/lab/cluster.yml have it."""
    return f"{SUBNET.rpartition('.')[0]}.{FIRST[kind] + number}"


def ensure_engine() -> None:
    """Make sure that this machine has a container engine that answers, as a deployment on it would."""
    try:
        docker("version")
    except (RuntimeError, FileNotFoundError):
        inventories = ("-i", "inventories/common", "-i", "inventories/local")
        subprocess.run(["ansible-playbook", *inventories, "playbooks/hosts.yml"], cwd=ROOT, check=True)


def image(bare: bool) -> str:
    """Build what is missing of the hosts' image and return its name; a bare one has no container engine."""
    base = hostimage.build()
    if bare:
        return base
    recipe = ENGINE_DOCKERFILE.format(base=base)
    known = docker("image", "inspect", "--format", "{{.Id}}", base) + recipe
    tag = f"pdstack-lab/host:{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    if not docker("images", "--quiet", tag):
        print("building the image of the lab's hosts (about a minute, once)", file=sys.stderr, flush=True)
        command = ["docker", "build", "--quiet", "--force-rm", "--tag", tag, "-"]
        done = subprocess.run(command, input=recipe, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the image of the lab's hosts: {done.stderr.strip()}")
    return tag


def running(kind: str = "") -> list[str]:
    """Return the containers of the lab that exist, in order."""
    return sorted(docker("ps", "--all", "--format", "{{.Names}}", "--filter", f"name=^{PREFIX}-{kind}[0-9]+$").split())


def start(number: int, from_image: str, kind: str = "") -> None:
    """Start host `number`; RuntimeError when its systemd does not come up."""
    host = name(number, kind)
    docker(
        *("run", "--detach", "--name", host, "--hostname", host, "--network", NETWORK, "--ip", address(number, kind)),
        *("--label", "pdstack.lab=host", *OPTIONS, from_image, "/sbin/init"),
    )
    deadline = time.monotonic() + BOOT_S
    while (state := docker("exec", host, "systemctl", "is-system-running", "--wait", check=False)) != "running":
        if state == "degraded" or time.monotonic() > deadline:
            failed = docker("exec", host, "systemctl", "--failed", "--no-legend", check=False)
            raise RuntimeError(f"{host}: systemd says {state or 'nothing'}, wanted running; failed units: {failed}")
        time.sleep(0.5)


def up(count: int, kind: str = "") -> list[str]:
    """Start hosts 1 to `count` that do not run yet and return the containers of all of them."""
    if not 1 <= count <= MOST[kind]:
        raise RuntimeError(f"hosts: found {count}, wanted 1 to {MOST[kind]}")
    ensure_engine()
    from_image = image(kind == BARE)
    if not docker("network", "ls", "--quiet", "--filter", f"name=^{NETWORK}$"):
        docker("network", "create", "--subnet", SUBNET, "--label", "pdstack.lab=network", NETWORK)
    present = running(kind)
    wanted = [number for number in range(1, count + 1) if name(number, kind) not in present]
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda number: start(number, from_image, kind), wanted))
    return [name(number, kind) for number in range(1, count + 1)]


def down(*kinds: str) -> None:
    """Remove the hosts of some kinds (of all, if none is named) with what they kept, and the network with the last."""
    ensure_engine()
    for kind in kinds or MOST:
        for host in running(kind):
            docker("rm", "--force", "--volumes", host)
    docker("network", "rm", NETWORK, check=False)


def hand_over(images: Sequence[str], hosts: Sequence[str]) -> None:
    """Copy `images` of this machine's engine into the hosts' engines, packed once. RuntimeError when one cannot."""
    archive = Path("/var/tmp") / f"{PREFIX}-images.tar"
    missing = [
        host
        for host in hosts
        if len(docker("exec", host, "docker", "image", "inspect", "--format", "{{.Id}}", *images, check=False).split())
        < len(images)
    ]
    if not missing:
        return
    docker("save", "--output", str(archive), *images)
    try:
        for host in missing:
            with archive.open("rb") as stream:
                command = ["docker", "exec", "--interactive", host, "docker", "load", "--quiet"]
                done = subprocess.run(command, stdin=stream, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{host}: loading the images: {done.stderr.strip()}")
    finally:
        archive.unlink()
