"""One thing that is wrong, in the form in which everything that checks says it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdstack.deploy.schema import Field, closest


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


def mapping(what: str, value: object, fields: Mapping[str, Field], required: bool = True) -> Iterator[Problem]:
    """Check a dict variable key by key: no unknown key, no missing one, every value of its type and range."""
    if not isinstance(value, Mapping):
        yield Problem(what, show(value), f"a mapping with the keys {', '.join(fields)}", f"write {what} as a mapping")
        return
    for key in value:
        if key not in fields:
            yield Problem(
                f"{what}.{key}", "an unknown key", f"one of {', '.join(fields)}",
                f"remove it or correct its spelling{closest(str(key), list(fields))}",
            )  # fmt: skip
    for key, field in fields.items():
        if key not in value:
            if required and field.required:
                yield Problem(
                    f"{what}.{key}", "nothing", field.text,
                    f"add it: a dict variable replaces the whole default, copy {what} from inventories/common",
                )  # fmt: skip
        elif (wrong := field.wrong(value[key])) is not None:
            yield Problem(f"{what}.{key}", show(value[key]), wrong, f"correct {what}.{key}")


def by_value(hosts: Mapping[str, Mapping[str, Any]], key: str) -> Iterator[tuple[Any, list[str]]]:
    """Group the hosts by the value they have for `key`, so that a fleet-wide mistake is told once."""
    seen: list[tuple[Any, list[str]]] = []
    for host, variables in hosts.items():
        value = variables.get(key)
        for other, names in seen:
            if other == value:
                names.append(host)
                break
        else:
            seen.append((value, [host]))
    yield from seen


def on(names: Sequence[str], hosts: Mapping[str, Any]) -> str:
    """Return ` on a, b`, or nothing when it is all hosts."""
    return "" if len(names) == len(hosts) else f" on {', '.join(names)}"
