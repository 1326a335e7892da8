"""The content address of a model: what decides its bytes decides the name of its directory.

Two deployments with the same model share one directory, and another model never lands in a directory that a running
worker has mapped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Raised when the converter writes other bytes for the same source.
FORMAT = 1
DIGITS = 12
CHUNK = 1 << 20


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def directory_digest(directory: Path, cache: Path) -> str:
    """Return one SHA-256 over the files of `directory` (names and contents).

    Weights are large and this runs on every deploy, so the digest of a file is kept in `cache` (JSON) under its path,
    size and modification time. FileNotFoundError when the directory holds no file.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    if not files:
        raise FileNotFoundError(
            f"model_ref {directory}: found no file on the controller, wanted a directory with config.json, "
            "tokenizer.json and *.safetensors; correct model_ref"
        )
    try:
        known: dict[str, str] = json.loads(cache.read_text())
    except (OSError, ValueError):
        known = {}
    parts, kept = [], {}
    for path in files:
        status = path.stat()
        key = f"{path}:{status.st_size}:{status.st_mtime_ns}"
        kept[key] = known.get(key) or file_digest(path)
        parts.append([str(path.relative_to(directory)), kept[key]])
    if kept != {key: known.get(key) for key in kept}:
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps({**known, **kept}))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def model_id(source: str, *, ref: str, name: str, pins: Mapping[str, Any], cache_dir: str) -> str:
    """Return the model's id, `<name>-<12 hex digits>`.

    `source` is model_source, `ref` model_ref, `name` model_name, `pins` versions.models (the package's version and
    checksum), `cache_dir` a directory of the controller.
    """
    if source == "package":
        identity: Any = {key: pins["package"][key] for key in ("package", "version", "sha256")}
    elif source == "path":
        identity = directory_digest(Path(ref).expanduser(), Path(cache_dir) / "model-digests.json")
    else:
        identity = ref
    digest = hashlib.sha256(json.dumps([FORMAT, source, identity], sort_keys=True).encode()).hexdigest()
    return f"{re.sub(r'[^a-z0-9.-]+', '-', name.lower()).strip('-.')}-{digest[:DIGITS]}"
