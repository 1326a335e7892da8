"""What a model's directory on a host holds, and whether a container of the runtime image can read it.

    python3 modelfiles.py DIRECTORY UID GID

prints a JSON of `path`, `files` (name -> size), `digest` and `problems`. Standard library only, and in one file: the
playbooks feed it to the python3 of a host. Weights are hundreds of GiB, so the digest is over names, sizes, whole small
files, and the beginning and end of large ones (the beginning of a safetensors file is its table of tensors): copies of
another model or revision, and copies that were cut short, differ in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SMALL = 16 << 20
EDGE = 1 << 20
READ, ENTER = 4, 1
# A list that is longer is cut.
SHOWN = 4
CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
INDEX = "model.safetensors.index.json"
# What downloads leave beside the files.
IGNORED = (".cache", ".git", ".gitattributes", ".huggingface")


def walk(directory: Path) -> list[str]:
    """Return the names of the model's files, relative to its directory, sorted."""
    found = []
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if name not in IGNORED]
        found += [str(Path(folder, name).relative_to(directory)) for name in names if name not in IGNORED]
    return sorted(found)


def sample(path: Path, size: int) -> str:
    """Return a SHA-256 (hex) of a file: of all of a small one, of the edges of a large one."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= SMALL:
            digest.update(file.read())
        else:
            digest.update(file.read(EDGE))
            file.seek(size - EDGE)
            digest.update(file.read(EDGE))
    return digest.hexdigest()


def may(status: os.stat_result, bit: int, uid: int, gid: int) -> bool:
    """Tell whether the mode lets `uid` (group `gid`) do what `bit` is."""
    shift = 6 if status.st_uid == uid else 3 if status.st_gid == gid else 0
    return bool(status.st_mode >> shift & bit)


def unreadable(directory: Path, names: Sequence[str], uid: int, gid: int) -> list[str]:
    """Return what the container's user cannot read or enter, with the mode that it has.

    The directory is mounted, so those above it do not matter.
    """
    below = {(directory / name).parent for name in names} - {directory}
    wanted = [(way, ENTER) for way in (directory, *sorted(below))]
    wanted += [(directory / name, READ) for name in names]
    status = {path: path.stat() for path, _ in wanted}
    return [
        f"{path} (mode {status[path].st_mode & 0o7777:04o})"
        for path, bit in wanted
        if not may(status[path], bit, uid, gid)
    ]


def cut_short(directory: Path, sizes: Mapping[str, int]) -> list[str]:
    """Return the safetensors files whose size is not what their own table of tensors says."""
    found = []
    for name, size in sizes.items():
        if not name.endswith(".safetensors"):
            continue
        with (directory / name).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                table = json.loads(file.read(length)) if 0 < length < size else {"": {}}
                ends = [entry["data_offsets"][1] for key, entry in table.items() if key != "__metadata__"]
            except (AttributeError, KeyError, TypeError, ValueError):
                found.append(f"{name}: no table of tensors at its beginning")
                continue
        wanted = 8 + length + max(ends or [0])
        if size != wanted:
            found.append(f"{name}: found {size} bytes, wanted {wanted}")
    return found


def named_and_missing(directory: Path, names: Sequence[str]) -> list[str]:
    """Return what is wrong with the files that the index of a model in several files names."""
    if INDEX not in names:
        return []
    try:
        wanted = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
    except (AttributeError, KeyError, TypeError, ValueError):
        return [f"{INDEX} cannot be read"]
    missing = sorted(wanted - set(names))
    return [f"missing of those that {INDEX} names: {cut(missing)}"] if missing else []


def cut(items: Sequence[str]) -> str:
    """Return a list as text, the end of a long one as a number."""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def look(given: Path, uid: int, gid: int) -> dict[str, Any]:
    """Return what is known of a directory (see the module's text); `problems` are sentences."""
    directory = given.resolve()
    if not directory.is_dir():
        return {"path": str(directory), "files": {}, "digest": "", "problems": ["no such directory"]}
    listed = walk(directory)
    names = [name for name in listed if (directory / name).exists()]
    sizes = {name: (directory / name).stat().st_size for name in names}
    problems = [f"{name}: a link to nothing" for name in listed if name not in sizes]
    if outside := [name for name in names if not (directory / name).resolve().is_relative_to(directory)]:
        problems.append(f"links out of the directory, which lead nowhere in a container: {cut(outside)}")
    if CONFIG not in names:
        problems.append(f"no {CONFIG}")
    if not set(TOKENIZERS) & set(names):
        problems.append(f"no {TOKENIZERS[0]}")
    if not any(name.endswith(".safetensors") for name in names):
        problems.append("no *.safetensors")
    problems += [*named_and_missing(directory, names), *cut_short(directory, sizes)]
    if hidden := unreadable(directory, names, uid, gid):
        problems.append(f"user {uid}:{gid} cannot read {cut(hidden)}")
    parts = [[name, size, sample(directory / name, size)] for name, size in sizes.items()]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return {"path": str(directory), "files": sizes, "digest": digest if parts else "", "problems": problems}


def different(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return, as sentences, which hosts hold another model than most; `found` is host -> what `look` returned.

    A host that holds none is not compared.
    """
    found = {host: looked for host, looked in found.items() if looked["digest"]}
    counted = Counter(str(look["digest"]) for look in found.values())
    if len(counted) < 2:
        return []
    usual = counted.most_common(1)[0][0]
    first = next(host for host, look in found.items() if look["digest"] == usual)
    pattern = found[first]["files"]
    sentences = []
    for host, looked in found.items():
        if looked["digest"] == usual:
            continue
        files = looked["files"]
        missing, more = sorted(set(pattern) - set(files)), sorted(set(files) - set(pattern))
        other = sorted(name for name in set(files) & set(pattern) if files[name] != pattern[name])
        parts = [
            f"{word} {cut(names)}"
            for word, names in (("without", missing), ("with", more), ("of another size:", other))
            if names
        ]
        sentences.append(
            f"{host} differs from {first}: {'; '.join(parts) or 'files of the same sizes, other contents'}"
        )
    return sentences


def main(arguments: Sequence[str]) -> int:
    """Command line; see the module's text."""
    directory, uid, gid = arguments
    sys.stdout.write(json.dumps(look(Path(directory), int(uid), int(gid))) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
