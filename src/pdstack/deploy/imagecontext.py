"""Prepare what an image needs beside its Dockerfile, so that the build itself needs no network.

`python -m pdstack.deploy.imagecontext worker --out DIR --requirements FILE` leaves
    DIR/site-packages   the pinned wheels of FILE, installed by the controller's own pip (its index, proxy and CA
                        settings apply), without what the services never load
    DIR/app/pdstack     the Python package, without the part that only a controller uses
`python -m pdstack.deploy.imagecontext binaries --out DIR --deb PACKAGE[=VERSION] ... --file PATH ...` leaves
    DIR/rootfs/PATH     the named files out of the distribution's packages (apt-get download, dpkg-deb -x), and
                        opt/pdstack/app/pdstack/probe.py for the health check

Both replace what was there before and print one JSON line with the sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from pdstack.deploy import elf

PACKAGE_ROOT = Path(__file__).resolve().parents[1]

# Parts of the wheels that no service of ours loads. Relative to site-packages, pathlib glob syntax.
UNUSED = (
    "bin",
    "include",
    "nixl_ep_cu12*",  # expert-parallel kernels, CUDA only
    "nixl_cu12.scripts",
    "*/ucx/libucx_perftest_*",
    "libucx/lib/ucx/libucx_perftest_*",
    "*/ucx/libuc[mt]_cuda*",  # need libcuda.so.1, which a CPU image has not
    "libucx/lib/ucx/libuc[mt]_cuda*",
    "libucx/bin",
    "libucx/include",
    "libucx/share",
    "libucx/lib/cmake",
    "libucx/lib/pkgconfig",
    "dynamo/vllm",
    "dynamo/sglang",
    "dynamo/trtllm",
    "dynamo/planner",
    "dynamo/mocker",
    "dynamo/nixl_connect",
    "numpy/f2py",
    "numpy/**/tests",
    "numpy/_core/include",
    "numpy/_core/lib",
    "numpy/random/lib",
    "uvloop/**/*.pyx",
    "uvloop/loop.c",
    "**/__pycache__",
    "**/*.a",
    "**/*.la",
    "**/*.pyi",
    "**/*.pxd",
    "*.dist-info/RECORD",
    "*.dist-info/direct_url.json",
    "*.dist-info/REQUESTED",
)
# NIXL loads its plugins by path, so the link closure cannot find the one that is wanted.
NIXL_PLUGIN_FOLDERS = (".nixl_cu12.mesonpy.libs/plugins", "nixl_cu12.libs/nixl")
NIXL_PLUGINS = ("libplugin_UCX.so",)
# Directories whose libraries are private to one wheel: what nothing links to can go.
PRIVATE_LIBRARIES = (".nixl_cu12.mesonpy.libs", "nixl_cu12.libs", "libucx_cu12.libs")
# Packages of ours that no container uses.
CONTROLLER_ONLY = ("deploy", "doctor")

PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")


class ContextError(Exception):
    """The context could not be prepared; the text says what was tried and what to do."""


def tree_bytes(root: Path) -> int:
    """Return the bytes of all regular files under `root`, symbolic links not followed."""
    return sum(path.lstat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink())


def install_wheels(requirements: Path, target: Path, python_version: str, machine: str) -> None:
    """Install the pinned wheels into `target` for another interpreter than the one that runs this.

    Every line of `requirements` must carry a hash. Raises ContextError with pip's own last lines.
    """
    tag = "cp" + python_version.replace(".", "")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--no-compile"]
    command += ["--only-binary", ":all:", "--target", str(target), "--requirement", str(requirements)]
    command += ["--python-version", python_version, "--implementation", "cp"]
    command += [word for abi in (tag, "abi3", "none") for word in ("--abi", abi)]
    command += [word for platform in PLATFORMS for word in ("--platform", f"{platform}_{machine}")]
    run(command, "install the worker image's wheels", {"PIP_ROOT_USER_ACTION": "ignore", "PIP_USER": "0"})


def run(
    command: Sequence[str], purpose: str, environment: dict[str, str] | None = None, cwd: Path | None = None
) -> None:
    """Run a command; raise ContextError with its last lines if it fails or does not exist."""
    try:
        done = subprocess.run(  # the command is built here, no shell
            list(command),
            env={**os.environ, **(environment or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise ContextError(f"cannot {purpose}: found no command {command[0]!r} on this machine; install it") from None
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise ContextError(f"cannot {purpose}: {' '.join(command[:4])} ... ended with {done.returncode}:\n{tail}")


def strip(root: Path) -> None:
    """Delete from an installed site-packages what the services never load, and turn copies into links."""
    for pattern in UNUSED:
        remove(root.glob(pattern))
    for folder in NIXL_PLUGIN_FOLDERS:
        remove(path for path in (root / folder).glob("*.so") if path.name not in NIXL_PLUGINS)
    remove(unlinked_libraries(root))
    link_copies(root)
    for name in ("tests", "test"):
        remove(path for path in root.glob(f"*/{name}") if path.is_dir())


def remove(paths: Iterable[Path]) -> None:
    """Delete files and whole directories; what is gone already is no error."""
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.exists() or path.is_symlink():
            path.unlink()


def unlinked_libraries(root: Path) -> list[Path]:
    """Return the libraries directly inside PRIVATE_LIBRARIES that nothing under `root` links to, even indirectly."""
    candidates = {
        path.name: path for name in PRIVATE_LIBRARIES for path in (root / name).glob("*.so*") if not path.is_symlink()
    }
    todo = [p for p in root.rglob("*.so*") if p.is_file() and p.name not in candidates and elf.is_elf(p)]
    used: set[str] = set()
    while todo:
        for name in elf.needed(todo.pop()):
            if name in candidates and name not in used:
                used.add(name)
                todo.append(candidates[name])
    return [path for name, path in candidates.items() if name not in used]


def link_copies(root: Path) -> None:
    """Replace equal shared libraries of one directory by links: wheels cannot hold links, so they hold copies."""
    seen: dict[tuple[Path, str], Path] = {}
    # The longest name (libucp.so.0.0.0) stays the file, as in a normal installation.
    for path in sorted(root.rglob("*.so*"), key=lambda p: (-len(p.name), p)):
        if path.is_symlink() or not path.is_file():
            continue
        key = (path.parent, hashlib.sha256(path.read_bytes()).hexdigest())
        first = seen.setdefault(key, path)
        if first != path:
            path.unlink()
            path.symlink_to(first.name)


def copy_application(source: Path, target: Path) -> None:
    """Copy our own package for use inside an image, readable by any user."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", *CONTROLLER_ONLY)
    shutil.copytree(source, target, ignore=ignore)


def make_readable(root: Path) -> None:
    """Let every user of the container read the files, whatever the controller's umask was."""
    for path in [root, *root.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def wheels_key(requirements: Path, python_version: str, machine: str) -> str:
    """Return a SHA-256 (hex) over all that decides what `site-packages` holds, this module's rules included."""
    parts = [requirements.read_bytes(), python_version.encode(), machine.encode()]
    parts += [Path(source).read_bytes() for source in (__file__, elf.__file__)]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def prepare_worker(out: Path, requirements: Path, python_version: str, machine: str) -> dict[str, int]:
    """Fill `out` for the worker image; return the bytes of `site-packages` and `app`.

    The wheels of an earlier run stay when nothing that decides about them has changed: a changed line of ours then
    costs no download, and the engine finds the layer of the wheels in its cache.
    """
    out.mkdir(parents=True, exist_ok=True)
    stamp = out / "site-packages.key"
    key = wheels_key(requirements, python_version, machine)
    fresh = stamp.is_file() and stamp.read_text() == key and (out / "site-packages").is_dir()
    # Built beside the target and renamed, so that an interrupted run never leaves half a context behind.
    with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as scratch:
        if not fresh:
            packages = Path(scratch) / "site-packages"
            install_wheels(requirements, packages, python_version, machine)
            strip(packages)
            stamp.unlink(missing_ok=True)
            publish(out, [packages])
            stamp.write_text(key)
        application = Path(scratch) / "app"
        copy_application(PACKAGE_ROOT, application / PACKAGE_ROOT.name)
        sizes = publish(out, [application])
    return sizes | {"site-packages": tree_bytes(out / "site-packages")}


def prepare_binaries(out: Path, debs: Sequence[str], files: Sequence[str]) -> dict[str, int]:
    """Fill `out`/rootfs with `files` (paths without leading slash) out of the distribution packages `debs`."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as scratch:
        unpacked = Path(scratch) / "unpacked"
        downloads = Path(scratch) / "debs"
        downloads.mkdir()
        downloads.chmod(0o777)  # apt drops privileges to _apt for downloads where it can
        Path(scratch).chmod(0o755)
        run(["apt-get", "download", *debs], f"download {', '.join(debs)}", cwd=downloads)
        for package in sorted(downloads.glob("*.deb")):
            run(["dpkg-deb", "-x", str(package), str(unpacked)], f"unpack {package.name}")
        rootfs = Path(scratch) / "rootfs"
        for name in files:
            source = unpacked / name
            if not source.is_file():
                raise ContextError(f"wanted the file /{name} in {', '.join(debs)}, it is not there")
            (rootfs / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, rootfs / name)
        # The health check of the worker image, so that all images are checked by one command.
        probe = rootfs / "opt/pdstack/app" / PACKAGE_ROOT.name
        probe.mkdir(parents=True)
        for name in ("__init__.py", "probe.py"):
            shutil.copy2(PACKAGE_ROOT / name, probe / name)
        return publish(out, [rootfs])


def publish(out: Path, trees: Sequence[Path]) -> dict[str, int]:
    """Move finished trees into `out`, replacing older ones; return their sizes in bytes by name."""
    sizes = {}
    for tree in trees:
        make_readable(tree)
        remove([out / tree.name])
        tree.rename(out / tree.name)
        sizes[tree.name] = tree_bytes(out / tree.name)
    return sizes


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="pdstack.deploy.imagecontext", description=(__doc__ or "").splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    worker = kinds.add_parser("worker", help="wheels and our package for the worker and frontend image")
    worker.add_argument("--out", type=Path, required=True)
    worker.add_argument("--requirements", type=Path, required=True)
    worker.add_argument("--python-version", default="3.11", help="of the python3 in the base image")
    worker.add_argument("--machine", default="x86_64", help="as uname -m says on the hosts")
    binaries = kinds.add_parser("binaries", help="programs out of distribution packages")
    binaries.add_argument("--out", type=Path, required=True)
    binaries.add_argument("--deb", action="append", required=True, help="PACKAGE or PACKAGE=VERSION; repeatable")
    binaries.add_argument("--file", action="append", required=True, help="path inside the packages; repeatable")
    options = parser.parse_args(arguments)
    try:
        if options.kind == "worker":
            sizes = prepare_worker(options.out, options.requirements, options.python_version, options.machine)
        else:
            sizes = prepare_binaries(options.out, options.deb, options.file)
    except ContextError as error:
        sys.stderr.write(f"pdstack.deploy.imagecontext: {error}\n")
        return 1
    sys.stdout.write(json.dumps({"out": str(options.out), "bytes": sizes}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
