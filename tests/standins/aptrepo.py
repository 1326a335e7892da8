"""Build a local apt repository of small real packages with the names and versions of NVIDIA's.

    python3 -m tests.standins.aptrepo --out DIR [--at /opt/pdstack-fake] [--kernel RELEASE]

Writes DIR/repo/{cuda,toolkit,doca}/..., each a flat repository (that is what NVIDIA's are) with Packages and Release,
signed with a throw-away key where gpg is there. `--at` is where DIR will lie on the host: the keyring package's source
list names that place. Needs dpkg-deb; nothing else of Debian's development tools.

The packages are genuine for dpkg and apt (dependencies, conflicts, several versions, maintainer scripts, units); what
they install is a stand-in: files of the fake root, and calls to the programs of programs/standin.py.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path

AT = "/opt/pdstack-fake"
# Two of the branch that is deployed, and one each of the branches before and after it.
DRIVERS = ("570.172.08", "580.95.05", "580.105.08", "590.44.01")
TOOLKITS = ("1.17.8-1", "1.19.1-1", "1.20.0-1")
GDRCOPY = ("2.5.1-1", "2.5.2-1")
DOCA = ("3.1.0-091000", "3.2.0-125000")
KEY_NAME = "pdstack stand-in repository <nobody@example.invalid>"
# apt gives maintainer scripts a PATH of its own (DPkg::Path), without the place of the stand-ins.
SCRIPT = "#!/bin/sh\nset -e\nPATH=/usr/local/sbin:$PATH\n"
LIBRARIES = "usr/lib/x86_64-linux-gnu"


@dataclass(frozen=True)
class Deb:
    """One package: control fields, files (path -> text; one that starts with #! is executable), maintainer scripts."""

    name: str
    version: str
    depends: str = ""
    conflicts: str = ""
    provides: str = ""
    architecture: str = "amd64"
    files: Mapping[str, str] = field(default_factory=dict)
    postinst: str = ""
    prerm: str = ""


def persistenced_unit() -> str:
    """Return the unit as NVIDIA's package ships it: with --no-persistence-mode."""
    return (
        "[Unit]\nDescription=NVIDIA Persistence Daemon\nWants=syslog.target\n\n"
        "[Service]\nType=forking\n"
        "ExecStart=/usr/bin/nvidia-persistenced --user nvidia-persistenced --no-persistence-mode --verbose\n"
        "ExecStopPost=/bin/rm -rf /var/run/nvidia-persistenced\n\n[Install]\nWantedBy=multi-user.target\n"
    )


def fabric_manager(name: str, version: str) -> Deb:
    """Return a fabric manager; its program ends at once when the loaded driver is of another version."""
    upstream = version.rsplit("-", 1)[0]
    unit = (
        "[Unit]\nDescription=NVIDIA fabric manager service\n\n[Service]\nType=forking\n"
        "ExecStart=/usr/bin/nv-fabricmanager -c /usr/share/nvidia/nvswitch/fabricmanager.cfg\n\n"
        "[Install]\nWantedBy=multi-user.target\n"
    )
    return Deb(
        name, version,
        conflicts="" if name == "nvidia-fabricmanager" else "nvidia-fabricmanager",
        files={
            "lib/systemd/system/nvidia-fabricmanager.service": unit,
            "usr/bin/nv-fabricmanager": f'#!/bin/sh\nexec /usr/local/sbin/pdstack-fake fabricmanager {upstream} "$@"\n',
            "usr/share/nvidia/nvswitch/fabricmanager.cfg": "FABRIC_MODE=0\n",
        },
        postinst="systemctl daemon-reload || true\n",
    )  # fmt: skip


def dkms_postinst(name: str, version: str) -> str:
    """Return what dh_dkms makes of it: a build where there are headers, a note where there are none."""
    return (
        f'[ "$1" = configure ] || exit 0\ndkms add {name}/{version}\n'
        f"dkms install {name}/{version} || echo 'Module build was skipped since the kernel headers"
        " do not seem to be installed.'\n"
    )


def program(name: str, at: str) -> dict[str, str]:
    """Return the files that make a stand-in a program of the host and of the fake root, where the probe looks first."""
    text = f'#!/bin/sh\nexec /usr/local/sbin/pdstack-fake run {name} "$@"\n'
    return {f"usr/bin/{name}": text, f"{at}/root/usr/bin/{name}".lstrip("/"): text}


def kernel_module(name: str, version: str, flavour: str, depends: str, conflicts: str) -> Deb:
    """Return a DKMS package: its source, and a postinst that builds it for the running kernel."""
    upstream = version.rsplit("-", 1)[0]
    return Deb(
        name, version, depends=depends, conflicts=conflicts,
        files={
            f"usr/src/nvidia-{upstream}/dkms.conf":
            f'PACKAGE_NAME="nvidia"\nPACKAGE_VERSION="{upstream}"\n# {flavour}\n',
        },
        postinst=dkms_postinst("nvidia", upstream),
        prerm=f"dkms remove nvidia/{upstream} --all || true\n",
    )  # fmt: skip


def driver(upstream: str, at: str) -> list[Deb]:
    """Return the driver's packages of one version, as the CUDA repository names them for Debian 12 (and for Ubuntu)."""
    branch = upstream.split(".")[0]
    version = f"{upstream}-1"
    exact = f"(= {version})"
    # As upstream has it: a lower bound, so that only a pin keeps the meta package on its branch.
    loose = f"(>= {upstream})"
    library = f"{at}/root/{LIBRARIES}/libnvidia-ml.so.{upstream}".lstrip("/")
    suffix = f"-{branch}" if int(branch) < 590 else ""
    user = (
        "getent passwd nvidia-persistenced >/dev/null ||"
        " useradd --system --no-create-home --home-dir / --shell /usr/sbin/nologin nvidia-persistenced\n"
        "systemctl daemon-reload || true\n"
    )
    kernel = f"nvidia-kernel-support {exact}, nvidia-dkms-helper"
    return [
        Deb("libcuda1", version, files={f"usr/share/doc/libcuda1-{upstream}": "stand-in\n"}),
        Deb("libnvidia-ml1", version, files={library: "stand-in\n"}, provides="libnvidia-ml.so.1"),
        Deb("nvidia-smi", version, depends=f"libnvidia-ml1 {exact}", files=program("nvidia-smi", at)),
        Deb(
            "nvidia-driver-cuda", version,
            depends=f"libcuda1 {exact}, libnvidia-ml1 {exact}, nvidia-smi {exact}, nvidia-persistenced {loose}",
        ),
        Deb("nvidia-kernel-support", version),
        kernel_module("nvidia-kernel-open-dkms", version, "open", kernel, "nvidia-kernel-dkms"),
        kernel_module(
            "nvidia-kernel-dkms", version, "proprietary", kernel, "nvidia-kernel-open-dkms"
        ),
        Deb("nvidia-open", version, depends=f"nvidia-driver-cuda {loose}, nvidia-kernel-open-dkms {loose}"),
        Deb("cuda-drivers", version, depends=f"nvidia-driver-cuda {loose}, nvidia-kernel-dkms {loose}"),
        Deb(
            "nvidia-persistenced", version,
            files={
                "lib/systemd/system/nvidia-persistenced.service": persistenced_unit(),
                "usr/bin/nvidia-persistenced": '#!/bin/sh\nexec /usr/local/sbin/pdstack-fake persistenced "$@"\n',
            },
            postinst=user,
        ),
        fabric_manager(f"nvidia-fabricmanager{suffix}", version),
        Deb(f"libnvidia-nscq{suffix}", version),
        Deb(f"nvidia-imex{suffix}", version),
        Deb(f"libnvidia-compute{suffix}", version),
        Deb(f"nvidia-utils{suffix}", version),
        Deb(f"nvidia-dkms{suffix}-open", version),
        Deb(
            f"nvidia-driver-pinning-{branch}", version, architecture="all", provides="nvidia-driver-pinning",
            files={f"etc/apt/preferences.d/nvidia-driver-pinning-{branch}":
                   f"Package: *nvidia* libcuda1 cuda-drivers*\nPin: version {branch}.*\nPin-Priority: 1000\n"},
        ),
    ]  # fmt: skip


def toolkit(version: str, at: str) -> list[Deb]:
    """Return the four packages of the container toolkit in one version."""
    exact = f"(= {version})"
    return [
        Deb("libnvidia-container1", version),
        Deb(
            "libnvidia-container-tools", version, depends=f"libnvidia-container1 {exact}",
            files=program("nvidia-container-cli", at),
        ),
        Deb(
            "nvidia-container-toolkit-base", version,
            files=program("nvidia-ctk", at) | program("nvidia-container-runtime", at),
            postinst=f"pdstack-fake set toolkit {version.rsplit('-', 1)[0]}\nsystemctl daemon-reload || true\n",
        ),
        Deb(
            "nvidia-container-toolkit", version,
            depends=f"nvidia-container-toolkit-base {exact}, libnvidia-container-tools {exact}",
        ),
    ]  # fmt: skip


def gdrcopy(version: str, at: str) -> list[Deb]:
    """Return GDRCopy's packages; gdrdrv is built by DKMS against the driver's source."""
    upstream = version.rsplit("-", 1)[0]
    return [
        Deb(
            "gdrdrv-dkms", version, architecture="all", depends="nvidia-dkms-helper",
            files={f"usr/src/gdrdrv-{upstream}/dkms.conf": f'PACKAGE_NAME="gdrdrv"\nPACKAGE_VERSION="{upstream}"\n'},
            postinst=dkms_postinst("gdrdrv", upstream),
            prerm=f"dkms remove gdrdrv/{upstream} --all || true\n",
        ),
        Deb("libgdrapi", version),
        Deb("gdrcopy-tests", version, depends=f"libgdrapi (= {version})", files=program("gdrcopy_sanity", at)),
        Deb("gdrcopy", version, depends=f"gdrdrv-dkms (= {version}), libgdrapi (= {version})"),
    ]  # fmt: skip


def doca(version: str, at: str) -> list[Deb]:
    """Return DOCA-OFED: a kernel side by DKMS, and the user space."""
    upstream = version.rsplit("-", 1)[0]
    return [
        Deb(
            "mlnx-ofed-kernel-dkms", version, architecture="all",
            postinst=(
                f'[ "$1" = configure ] || exit 0\ndkms install mlnx-ofed-kernel/{upstream}\n'
                f"pdstack-fake set ofed {upstream}\n"
            ),
            prerm="pdstack-fake set ofed ''\n",
        ),
        Deb("doca-ofed-userspace", version, architecture="all", files=program("ofed_info", at)),
        Deb(
            "doca-ofed", version, architecture="all",
            depends=f"mlnx-ofed-kernel-dkms (= {version}), doca-ofed-userspace (= {version})",
        ),
    ]  # fmt: skip


def headers(kernel: str, at: str) -> list[Deb]:
    """Return headers for a kernel that no archive has, an empty stand-in for dkms, and a leftover of Debian."""
    makefile = f"{at}/root/lib/modules/{kernel}/build/Makefile".lstrip("/")
    return [
        Deb(
            f"linux-headers-{kernel}", "1.0", files={makefile: "# stand-in\n"},
            postinst=f"dkms autoinstall -k {kernel} || true\n",
        ),
        Deb("nvidia-dkms-helper", "1.0", architecture="all"),
        # A part of Debian's own driver, with a version of its archive.
        Deb("nvidia-alternative", "535.261.03-1~deb12u1"),
    ]  # fmt: skip


def keyring(at: str, version: str, signed: bool, public: str) -> Deb:
    """Return the package that brings the CUDA repository's key and source list."""
    option = "signed-by=/usr/share/keyrings/cuda-archive-keyring.asc" if signed else "trusted=yes"
    files = {
        "etc/apt/sources.list.d/cuda-debian12-x86_64.list": f"deb [{option}] file:{at}/repo/cuda/debian12/x86_64/ /\n"
    }
    if signed:
        files["usr/share/keyrings/cuda-archive-keyring.asc"] = public
    return Deb("cuda-keyring", version, architecture="all", files=files)


def build(deb: Deb, into: Path) -> Path:
    """Build one package and return its file."""
    into.mkdir(parents=True, exist_ok=True)
    target = into / f"{deb.name}_{deb.version}_{deb.architecture}.deb"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        control = [f"Package: {deb.name}", f"Version: {deb.version}", f"Architecture: {deb.architecture}"]
        control += ["Maintainer: nobody <nobody@example.invalid>", "Section: misc", "Priority: optional"]
        for key in ("depends", "conflicts", "provides"):
            if getattr(deb, key):
                control.append(f"{key.capitalize()}: {getattr(deb, key)}")
        control += ["Description: stand-in", ""]
        (root / "DEBIAN").mkdir()
        (root / "DEBIAN/control").write_text("\n".join(control))
        for name in ("postinst", "prerm"):
            if getattr(deb, name):
                (root / f"DEBIAN/{name}").write_text(SCRIPT + getattr(deb, name))
                (root / f"DEBIAN/{name}").chmod(0o755)
        for name, text in deb.files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755 if text.startswith("#!") else 0o644)
        command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(root), str(target)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target


def index(folder: Path, sign: Sequence[str] = ()) -> None:
    """Write Packages and Release of a flat repository, and InRelease with the command `sign`."""
    paragraphs = []
    for path in sorted(folder.glob("*.deb")):
        control = subprocess.run(["dpkg-deb", "--field", str(path)], check=True, capture_output=True, text=True).stdout
        data = path.read_bytes()
        paragraphs.append(
            control.rstrip("\n")
            + f"\nFilename: ./{path.name}\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
        )
    packages = "\n".join(paragraphs).encode()
    (folder / "Packages").write_bytes(packages)
    (folder / "Packages.gz").write_bytes(gzip.compress(packages, mtime=0))
    lines = ["Origin: NVIDIA", "Label: stand-in", f"Date: {formatdate(usegmt=True)}", "SHA256:"]
    for name in ("Packages", "Packages.gz"):
        data = (folder / name).read_bytes()
        lines.append(f" {hashlib.sha256(data).hexdigest()} {len(data)} {name}")
    (folder / "Release").write_text("\n".join(lines) + "\n")
    if sign:
        command = [*sign, "--clearsign", "--output", str(folder / "InRelease"), str(folder / "Release")]
        subprocess.run(command, check=True, capture_output=True)


def make_key(home: Path) -> tuple[list[str], str]:
    """Return the command that signs with a new throw-away key, and the public key as text; ([], "") without gpg."""
    if shutil.which("gpg") is None:
        return [], ""
    home.mkdir(mode=0o700)
    gpg = ["gpg", "--homedir", str(home), "--batch", "--yes", "--pinentry-mode", "loopback", "--passphrase", ""]
    subprocess.run(
        [*gpg, "--quick-generate-key", KEY_NAME, "rsa2048", "sign", "never"], check=True, capture_output=True
    )
    public = subprocess.run([*gpg, "--armor", "--export"], check=True, capture_output=True, text=True).stdout
    return [*gpg, "--digest-algo", "SHA512"], public


def make(out: Path, at: str = AT, kernel: str = "") -> None:
    """Build everything below `out`; what is there already is replaced."""
    kernel = kernel or platform.release()
    repo = out / "repo"
    shutil.rmtree(repo, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="pdstack-gpg-") as folder:
        sign, public = make_key(Path(folder) / "home")
        cuda, tools, ofed = (
            repo / "cuda/debian12/x86_64",
            repo / "toolkit/stable/deb/amd64",
            repo / "doca/debian12/x86_64",
        )
        for version in DRIVERS:
            for deb in driver(version, at):
                build(deb, cuda)
        for version in GDRCOPY:
            for deb in gdrcopy(version, at):
                build(deb, cuda)
        for deb in headers(kernel, at):
            build(deb, cuda)
        # NVIDIA's name of the file has a dash of its own: cuda-keyring_1.1-1_all.deb.
        for version in ("1.0-1", "1.1-1"):
            build(keyring(at, version, bool(sign), public), cuda)
        for version in TOOLKITS:
            for deb in toolkit(version, at):
                build(deb, tools)
        for version in DOCA:
            for deb in doca(version, at):
                build(deb, ofed)
        for folder_ in (cuda, tools, ofed):
            index(folder_, sign)
        # Where NVIDIA keeps the toolkit's key, armoured as there; DOCA's beside its packages.
        for path in (repo / "toolkit/gpgkey", repo / "doca/GPG-KEY-Mellanox.pub"):
            path.write_text(public)
        if sign:
            subprocess.run(["gpgconf", "--homedir", str(Path(folder) / "home"), "--kill", "all"], check=False)


def main() -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--at", default=AT)
    parser.add_argument("--kernel", default="")
    parser.add_argument("--tar", type=Path, help="also pack repo/ and programs/ into this file")
    options = parser.parse_args()
    os.umask(0o022)
    options.out.mkdir(parents=True, exist_ok=True)
    make(options.out, options.at, options.kernel)
    if options.tar:
        programs = Path(__file__).resolve().parent
        command = ["tar", "--create", "--owner=0", "--group=0", "--file", str(options.tar)]
        command += ["-C", str(options.out), "repo", "-C", str(programs), "programs"]
        subprocess.run(command, check=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
