"""The image of the test host: a distribution with systemd, as an operator would hand it over.

Made from the project's own base image with the controller's apt sources and CA bundle, so that no registry is
needed and packages come from where the controller gets its own. Docker's layer cache keeps it from being built twice.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TAG = "pdstack-molecule/host:latest"
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

# The CA bundle is put in place after ca-certificates has written its own.
DOCKERFILE = """\
FROM {base}
RUN rm -rf /etc/apt/sources.list /etc/apt/sources.list.d
COPY configuration/ /
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
RUN apt-get update \\
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends {packages} \\
 && apt-get clean \\
 && rm -f /etc/machine-id /var/lib/dbus/machine-id && touch /etc/machine-id
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
STOPSIGNAL SIGRTMIN+3
CMD ["/sbin/init"]
"""


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


def build(base: str) -> str:
    """Build the image on top of `base` and return its name; CalledProcessError when Docker cannot."""
    with tempfile.TemporaryDirectory(prefix="pdstack-molecule-") as folder:
        context = Path(folder)
        collect(context / "configuration")
        shutil.copy(CA_BUNDLE, context / "ca-certificates.crt")
        (context / "Dockerfile").write_text(DOCKERFILE.format(base=base, packages=" ".join(PACKAGES)))
        subprocess.run(["docker", "build", "--quiet", "--tag", TAG, folder], check=True, stdout=sys.stderr)
    return TAG


if __name__ == "__main__":
    print(build(sys.argv[1]))
