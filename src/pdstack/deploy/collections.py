"""The Ansible collections that pdstack uses, without Galaxy.

The `ansible` wheel on the Python index carries every collection; the few that are needed are taken out of the one
pinned in `versions.yml` (key `collections`: wheel, version, sha256, names). pip fetches it, so that the controller's
index, proxy and CA settings apply.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import TypedDict, cast

import yaml

VERSIONS = Path(__file__).resolve().parents[3] / "inventories/common/group_vars/all/versions.yml"


class CollectionsPin(TypedDict):
    """Which wheel the collections come from, its checksum, and the collections to take."""

    wheel: str
    version: str
    sha256: str
    names: list[str]


def read_pin(versions_file: Path) -> CollectionsPin:
    """Return the pin from the versions file; KeyError when it has none."""
    return cast(CollectionsPin, yaml.safe_load(versions_file.read_text())["versions"]["collections"])


def pin_digest(pin: CollectionsPin) -> str:
    """Return one digest of all that decides the extracted tree."""
    return hashlib.sha256(repr(sorted(pin.items())).encode()).hexdigest()


def fetch_wheel(pin: CollectionsPin, into: Path) -> Path:
    """Download the pinned wheel with pip, which checks the sha256; CalledProcessError when it cannot."""
    requirement = into / "requirement.txt"
    requirement.write_text(f"{pin['wheel']}=={pin['version']} --hash=sha256:{pin['sha256']}\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes",
         "--disable-pip-version-check", "--dest", str(into), "-r", str(requirement)],
        check=True,
    )  # fmt: skip
    return next(into.glob("*.whl"))


def extract(wheel: Path, names: list[str], into: Path) -> None:
    """Unpack the named collections (`namespace.name`) into `into`; ValueError names those the wheel lacks."""
    prefixes = {f"ansible_collections/{name.replace('.', '/')}/": name for name in names}
    found: set[str] = set()
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            for prefix, name in prefixes.items():
                if member.startswith(prefix) and ".." not in PurePosixPath(member).parts:
                    archive.extract(member, into)
                    found.add(name)
    if missing := sorted(set(names) - found):
        raise ValueError(f"{wheel.name} has no collection {', '.join(missing)}: correct versions.collections.names")


def ensure(pin: CollectionsPin, cache: Path) -> bool:
    """Make `cache/collections` hold exactly the pinned collections; return whether anything had to be done."""
    target = cache / "collections"
    marker = target / "pdstack.pin"
    digest = pin_digest(pin)
    if marker.is_file() and marker.read_text() == digest:
        return False
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheel = fetch_wheel(pin, Path(scratch))
        fresh = Path(scratch) / "collections"
        extract(wheel, pin["names"], fresh)
        (fresh / marker.name).write_text(digest)
        # The whole tree appears at once: an interrupted run leaves the old one.
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    return True


def main() -> int:
    """Command line: `python -m pdstack.deploy.collections --cache .cache`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--versions", type=Path, default=VERSIONS)
    arguments = parser.parse_args()
    pin = read_pin(arguments.versions)
    try:
        if ensure(pin, arguments.cache):
            sys.stderr.write(f"collections: {', '.join(pin['names'])} from {pin['wheel']} {pin['version']}\n")
    except subprocess.CalledProcessError:
        sys.stderr.write(
            f"collections: {pin['wheel']}=={pin['version']} (sha256 {pin['sha256'][:12]}…) could not be fetched.\n"
            "  wanted: the Python index that pip uses, reachable from here, with the checksum unchanged\n"
            "  fix:    check `pip download` by hand (index, proxy, CA), or fill .cache/collections yourself\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
