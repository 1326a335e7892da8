"""A three-way merge for the container engine's daemon.json: what is there stays, what is ours follows the inventory.

Three documents meet: `existing` (on the host, perhaps edited by a person), `wanted` (from the inventory) and
`previous` (what the last run wanted, kept in a state file). A value that a person set is never changed; a value that
the last run set and nobody touched since is ours, so it may change or go.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypedDict


class DaemonJsonError(ValueError):
    """The existing file cannot be merged into; the text says what was found and how to mend it."""


class Merge(TypedDict):
    """The text to write (empty: no file), a sentence for each wanted value that was not taken, and whether the
    existing file holds anything that is not ours (then it deserves a backup).
    """

    content: str
    conflicts: list[str]
    foreign: bool


def load(text: str, path: str = "daemon.json") -> dict[str, Any]:
    """Return the document in `text`; nothing at all is an empty one. Raises DaemonJsonError for anything else."""
    if not text.strip():
        return {}
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise DaemonJsonError(
            f"{path}: is not JSON (line {error.lineno}: {error.msg}); the engine would not start with it. Mend the file"
        ) from None
    if not isinstance(document, dict):
        raise DaemonJsonError(f"{path}: found a {type(document).__name__}, wanted an object in braces. Mend the file")
    return document


def merge(
    existing: Mapping[str, Any], wanted: Mapping[str, Any], previous: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the merged document and the conflicts, as sentences.

    Objects are merged key by key; lists are united, in the order they have; of two other values the existing one
    stays, unless it is the one that `previous` put there.
    """
    merged: dict[str, Any] = {}
    conflicts: list[str] = []
    before = previous or {}
    for key in [*existing, *(k for k in wanted if k not in existing)]:
        value, problems, keep = merge_value(key, existing, wanted, before)
        conflicts += problems
        if keep:
            merged[key] = value
    return merged, conflicts


def merge_value(
    key: str, existing: Mapping[str, Any], wanted: Mapping[str, Any], previous: Mapping[str, Any]
) -> tuple[Any, list[str], bool]:
    """Return the merged value of one key, the conflicts below it, and whether the key stays at all."""
    if key not in existing:
        return wanted[key], [], True
    have = existing[key]
    want = wanted.get(key)
    was = previous.get(key)
    if isinstance(have, dict) and isinstance(want, dict | None) and isinstance(was, dict | None):
        inner, problems = merge(have, want or {}, was)
        # An object that held nothing but what was ours goes with it.
        keep = bool(inner) or key in wanted or key not in previous
        return inner, [f"{key}.{problem}" for problem in problems], keep
    if isinstance(have, list) and isinstance(want, list | None) and isinstance(was, list | None):
        kept = [item for item in have if item not in (was or []) or item in (want or [])]
        united = kept + [item for item in (want or []) if item not in kept]
        return united, [], bool(united) or key in wanted or key not in previous
    if key not in wanted:
        ours = key in previous and have == was
        return have, [], not ours
    if have == want or (key in previous and have == was):
        return want, [], True
    return have, [f"{key}: is {have!r} on the host and stays so; the inventory wants {want!r}"], True


def render(document: Mapping[str, Any]) -> str:
    """Return the text of the file."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def update(
    text: str, wanted: Mapping[str, Any], previous: Mapping[str, Any] | None = None, path: str = "daemon.json"
) -> Merge:
    """Return what the file `text` becomes; byte for byte the same when nothing in it has to change."""
    existing = load(text, path)
    document, conflicts = merge(existing, wanted, previous)
    return {
        "content": text if document == existing and text.strip() else render(document) if document else "",
        "conflicts": conflicts,
        "foreign": bool(merge(existing, {}, previous)[0]),
    }
