"""One thing that is wrong, in the form in which everything that checks says it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what was checked, what was found, what was wanted, how to fix it."""

    what: str
    found: str
    wanted: str
    fix: str


def show(value: object) -> str:
    """Return a value as the operator reads it."""
    return "nothing" if value is None or value == "" else repr(value)
