"""The JSON in which an exporter says how to reach its pool. It comes from a peer, so nothing in it is believed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from pdstack.transfer.errors import ReadFailed

# Deeper than anything that this package sends. Python's own limit depends on how deep the reader itself stands: what
# it lets through might not be printed any more in the error that follows.
MAX_DEPTH = 32


class Whole(NamedTuple):
    """A field that is a whole number of these bounds, both included."""

    low: int
    high: int


class Text(NamedTuple):
    """A field that is text of at most so many characters, none of them unprintable but `also`."""

    most: int
    also: str = ""


class Texts(NamedTuple):
    """A field that is an object of texts of at most so many characters."""

    most: int


Kind = Whole | Text | Texts
ADDRESS = Whole(0, (1 << 63) - 1)
NBYTES = Whole(1, (1 << 62) - 1)
BASE64 = Text(4 << 20)


def read_json(text: bytes) -> Any:
    """What a peer's JSON says. Raises ValueError if it says nothing, or is nested deeper than :data:`MAX_DEPTH`."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH:  # else there is no need to look
        level = [value]
        for _ in range(MAX_DEPTH + 1):
            level = [each for each in level if isinstance(each, list | dict)]
            level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
        if level:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
    return value


def read_metadata(blob: bytes, what: str, **fields: Kind) -> dict[str, Any]:
    """The named fields of a JSON object, each of its kind; others are left out. Raises :class:`ReadFailed`."""
    try:
        values = read_json(blob)
        if not isinstance(values, Mapping):
            raise ValueError(f"it is {type(values).__name__}, wanted an object")
        return {name: _checked(name, values.get(name), kind) for name, kind in fields.items()}
    except ValueError as error:
        raise ReadFailed(f"the peer's {what} metadata cannot be read: {error}") from None


def _checked(name: str, value: Any, kind: Kind) -> Any:
    if isinstance(kind, Texts):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is not an object")
        return {key: _checked(name, text, Text(kind.most)) for key, text in value.items()}
    if isinstance(kind, Whole):
        if not isinstance(value, int) or isinstance(value, bool) or not kind.low <= value <= kind.high:
            raise ValueError(f"{name} is {value!r:.40}, wanted a whole number from {kind.low} to {kind.high}")
        return value
    if not isinstance(value, str) or len(value) > kind.most:
        raise ValueError(f"{name} is not text of at most {kind.most} characters")
    if not value.translate(dict.fromkeys(map(ord, kind.also))).isprintable():
        # Neither a log nor a system call could take it.
        raise ValueError(f"{name} has characters that cannot be printed")
    return value
