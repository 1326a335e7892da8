"""Tags that name content: a hash over everything that determines an image.

The same inputs give the same tag on every machine, so an image that exists under its tag is never built again, and a
changed source file, requirement or recipe always gives a new one. Everything is computed on the controller, without a
container engine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TAG_LENGTH = 12
# Left out of a source tree: made by the interpreter.
NOT_SOURCE = ("__pycache__",)


def tag(inputs: Any) -> str:
    """Return the first 12 hex digits of a SHA-256 over `inputs` (JSON-able), independent of the order of keys."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:TAG_LENGTH]


def tree_digest(root: str | Path, exclude: Iterable[str] = ()) -> str:
    """Return a SHA-256 (hex) over names and contents of the files below `root`.

    `exclude` names directories directly below `root` that are not shipped. Times, owners and modes do not count.
    Raises FileNotFoundError when there is nothing: an image of no source is a mistake.
    """
    base = Path(root)
    skipped = set(exclude)
    digest = hashlib.sha256()
    count = 0
    for path in sorted(base.rglob("*")):
        parts = path.relative_to(base).parts
        if not path.is_file() or parts[0] in skipped or any(p in NOT_SOURCE for p in parts) or path.suffix == ".pyc":
            continue
        name = "/".join(parts).encode()
        content = path.read_bytes()
        # Lengths in front keep two different trees from running together into the same bytes.
        digest.update(f"{len(name)}:{len(content)}:".encode() + name + content)
        count += 1
    if count == 0:
        raise FileNotFoundError(f"{base}: found no source file to put into an image; wanted the project's own package")
    return digest.hexdigest()


def file_digests(root: str | Path, names: Iterable[str]) -> dict[str, str]:
    """Return name -> SHA-256 (hex) of files below `root`."""
    return {name: hashlib.sha256((Path(root) / name).read_bytes()).hexdigest() for name in names}


def reference(prefix: str, image: str, inputs: Any) -> str:
    """Return `prefix/image:tag` for the inputs of an image; `prefix` may hold a registry."""
    return f"{prefix.rstrip('/')}/{image}:{tag(inputs)}"


def references(
    catalog: Mapping[str, Mapping[str, Any]], dockerfiles: Mapping[str, str], *, prefix: str, project: str
) -> dict[str, str]:
    """Return image -> reference for a catalogue of images.

    `catalog` says of each image what goes in: `requirements` (a file), `sources` (a tree, with `exclude`), both
    relative to `project`, and plain data (packages, versions). `dockerfiles` holds the rendered texts.
    """
    root = Path(project)
    found = {}
    for image, entry in catalog.items():
        inputs: dict[str, Any] = {"dockerfile": dockerfiles[image], "entry": dict(entry)}
        if "files" in entry:
            inputs["files"] = file_digests(root, entry["files"])
        if "sources" in entry:
            inputs["sources"] = tree_digest(root / entry["sources"], entry.get("exclude", ()))
        found[image] = reference(prefix, image, inputs)
    return found


def needed(topology: Mapping[str, Any], host: str, *, engine: str, coordination_image: str = "own") -> list[str]:
    """Return which of our own images `host` runs: etcd, nats, worker.

    With the engine trtllm frontend and workers run in the runtime image; with `coordination_image` runtime, etcd and
    NATS do so too.
    """
    runs = {
        "etcd": coordination_image == "own" and any(entry["host"] == host for entry in topology["etcd"]),
        "nats": coordination_image == "own" and any(entry["host"] == host for entry in topology["nats"]),
        "worker": engine == "reference"
        and any(entry["host"] == host for entry in [*topology["frontends"], *topology["workers"]]),
    }
    return [image for image, wanted in runs.items() if wanted]
