"""The image of the test host: a distribution with systemd, as an operator would hand it over.

Bootstrapped from the controller's own apt sources (as the project's base image is), with the controller's package
configuration and CA bundle, so that no registry is needed and apt works inside. Made once: the tags say what is in it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pdstack.deploy import baseimage

TAG = "pdstack-molecule/host:latest"
CACHE = Path("/var/cache/pdstack/debs")
PACKAGES = (
    "ca-certificates",
    "dbus",
    "iproute2",
    "kmod",
    "procps",
    "python3",
    "python3-apt",
    "python3-requests",
    "systemd",
    "systemd-sysv",
)
# What decides where apt and pip get packages from, and whom they trust.
HOST_CONFIGURATION = (
    "/etc/apt/apt.conf.d",
    "/etc/apt/auth.conf.d",
    "/etc/apt/keyrings",
    "/etc/apt/preferences.d",
    "/etc/apt/sources.list",
    "/etc/apt/sources.list.d",
    "/etc/pip.conf",
    "/etc/xdg/pip",
    "/usr/share/keyrings",
)
# Hooks of packages that the test host does not have.
FOREIGN_HOOKS = ("20packagekit", "50appstream", "99needrestart")
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")

DOCKERFILE = """\
FROM {base}
RUN rm -rf /etc/apt/sources.list /etc/apt/sources.list.d \\
 && rm -f /etc/machine-id /var/lib/dbus/machine-id && touch /etc/machine-id
COPY configuration/ /
STOPSIGNAL SIGRTMIN+3
CMD ["/sbin/init"]
"""


def output(*command: str) -> str:
    """Return what a command prints; CalledProcessError when it fails."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def suite() -> str:
    """Return the codename of the controller's own release."""
    lines = Path("/etc/os-release").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)["VERSION_CODENAME"].strip('"')


def bootstrap() -> str:
    """Make the distribution with PACKAGES if it is not there (about a minute), and return the name of its image."""
    release, architecture = suite(), output("dpkg", "--print-architecture")
    recipe = hashlib.sha256(" ".join((release, architecture, *PACKAGES)).encode()).hexdigest()[:12]
    name = f"pdstack-molecule/{release}:{recipe}"
    if output("docker", "images", "--quiet", name):
        return name
    if not shutil.which("debootstrap"):
        subprocess.run(["apt-get", "install", "--yes", "--no-install-recommends", "debootstrap"], check=True)
    sources = {str(path): path.read_text() for path in Path("/etc/apt").rglob("*.list")}
    sources |= {str(path): path.read_text() for path in Path("/etc/apt").rglob("*.sources")}
    plan = baseimage.plan(sources, suite=release, architecture=architecture)
    options = [f"--keyring={plan['keyring']}"] if plan["keyring"] else []
    options += ["--no-check-gpg"] if plan["trusted"] else []
    CACHE.mkdir(parents=True, exist_ok=True)
    print(f"bootstrapping {release} for the test host (about a minute)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="pdstack-molecule-", dir="/var/tmp") as folder:
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", f"--cache-dir={CACHE}"]
        command += [f"--components={','.join(plan['components'])}", *options, release, folder, plan["mirror"]]
        environment = os.environ | baseimage.proxy_environment(output("apt-config", "dump"))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"molecule: the test host could not be bootstrapped:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        shutil.rmtree(Path(folder) / "var/cache/apt/archives")
        archive = subprocess.Popen(["tar", "--create", "--numeric-owner", "-C", folder, "."], stdout=subprocess.PIPE)
        subprocess.run(["docker", "import", "-", name], stdin=archive.stdout, stdout=sys.stderr, check=True)
        if archive.wait() != 0:
            sys.exit(f"molecule: packing {folder} failed with {archive.returncode}")
    return name


def collect(into: Path) -> None:
    """Copy the controller's package configuration below `into`, at the paths it has here, as far as it exists."""
    for name in HOST_CONFIGURATION:
        source, target = Path(name), into / name.lstrip("/")
        if not source.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*FOREIGN_HOOKS))
        else:
            shutil.copy2(source, target)
    bundle = into / str(CA_BUNDLE).lstrip("/")
    bundle.parent.mkdir(parents=True)
    shutil.copy(CA_BUNDLE, bundle)


def build() -> str:
    """Build the image and return its name; CalledProcessError when Docker cannot."""
    base = bootstrap()
    with tempfile.TemporaryDirectory(prefix="pdstack-molecule-") as folder:
        context = Path(folder)
        collect(context / "configuration")
        (context / "Dockerfile").write_text(DOCKERFILE.format(base=base))
        # A client without BuildKit says on stderr that its builder is old.
        done = subprocess.run(
            ["docker", "build", "--quiet", "--force-rm", "--network", "none", "--tag", TAG, folder],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            sys.exit(f"molecule: the image of the test host could not be built:\n{done.stdout}{done.stderr}")
    return TAG


if __name__ == "__main__":
    print(build())
