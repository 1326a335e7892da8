"""`pdstack-model.json`: where a model came from and the SHA-256 of each of its files.

Written last and into place by rename, so that a directory with one is complete.

    python3 manifest.py quick|full DIRECTORY     quick compares names and sizes, full also the contents

Standard library only, and in one file: the playbooks feed it to the python3 of a host to check what is there.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["NAME", "main", "manifest_problems", "write_manifest"]

NAME = "pdstack-model.json"


def digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path, source: dict[str, Any]) -> None:
    """Describe all files of `directory`; makes them readable by everybody (containers run under another uid)."""
    files: dict[str, Any] = {}
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name != NAME:
            path.chmod(0o644)
            files[path.name] = {"sha256": digest(path), "size": path.stat().st_size}
    partial = directory / f".{NAME}"
    partial.write_text(json.dumps({"format": 1, "source": source, "files": files}, indent=2, sort_keys=True) + "\n")
    partial.chmod(0o644)
    partial.rename(directory / NAME)


def manifest_problems(directory: Path, *, full: bool) -> list[str]:
    """What differs from the manifest, as sentences; `full` reads and compares the contents too."""
    try:
        entries: dict[str, Any] = json.loads((directory / NAME).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{directory / NAME}: can not be read ({error}); the model was not made to the end, make it again"]
    problems: list[str] = []
    for name, wanted in entries.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != wanted["size"]:
            problems.append(f"{path}: found {path.stat().st_size} bytes, wanted {wanted['size']}")
        elif full and (found := digest(path)) != wanted["sha256"]:
            problems.append(f"{path}: found sha256 {found}, wanted {wanted['sha256']}")
    return problems


def main(arguments: list[str]) -> int:
    """Command line; 0 when the directory is what its manifest says, 1 with what differs on stderr."""
    depth, directory = arguments
    problems = manifest_problems(Path(directory), full=depth == "full")
    if problems:
        found = "\n           ".join(problems)
        sys.stderr.write(
            f"The model is not what was made.\n   found:  {found}\n   wanted: the files that {NAME} names\n"
            f"   fix:    delete {directory} and deploy again\n"
        )
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
