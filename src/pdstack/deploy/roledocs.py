"""The README of each Ansible role, written from its argument specs.

The specs are what Ansible checks, so a README made from them cannot promise what the role does not take.
`python -m pdstack.deploy.roledocs` writes the files, `--check` only tells which are stale.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdstack.deploy.argspecs import ROLES, load, read_defaults, read_specs, role_directories

MARK = "<!-- Generated from meta/argument_specs.yml by `python -m pdstack.deploy.roledocs`. -->"


def text(value: object) -> str:
    """Return a description as one line of Markdown; lists of paragraphs are joined."""
    joined = " ".join(str(part) for part in value) if isinstance(value, list) else str(value or "")
    return " ".join(joined.split()).replace("|", "\\|")


def code(value: object) -> str:
    """Return a value as inline code, in JSON so that strings, numbers and booleans can be told apart."""
    shown = value if isinstance(value, str) and "{{" in value else json.dumps(value, sort_keys=True)
    return f"`{' '.join(str(shown).split())}`".replace("|", "\\|")


def type_of(option: dict[str, Any]) -> str:
    """Return the type of an option: `list of dict` for a list with elements."""
    kind = str(option.get("type", "str"))
    return f"{kind} of {option['elements']}" if "elements" in option else kind


def default_of(name: str, option: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Return what an option is when nobody sets it, in words where there is no value."""
    if option.get("required"):
        return "required"
    if name in defaults and defaults[name] is not None:
        return code(defaults[name])
    return code(option["default"]) if option.get("default") is not None else "none"


def table(options: dict[str, dict[str, Any]], defaults: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a Markdown table of options, one row each."""
    yield "| variable | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, option in options.items():
        meaning = text(option.get("description"))
        if "choices" in option:
            meaning += " One of " + ", ".join(code(choice) for choice in option["choices"]) + "."
        yield f"| `{name}` | {type_of(option)} | {default_of(name, option, defaults)} | {meaning} |"


def nested(
    options: dict[str, dict[str, Any]], shown: dict[str, dict[str, dict[str, Any]]], prefix: str = ""
) -> Iterator[str]:
    """Yield a table for each option that is a dict with declared keys, depth first.

    `shown` remembers what has been: an entry point that takes the same dict as one before it gets a sentence.
    """
    for name, option in options.items():
        below = option.get("options")
        if not below:
            continue
        path = f"{prefix}{name}"
        if shown.get(path) == below:
            yield from ("", f"Keys of `{path}`: as above.")
            continue
        shown[path] = below
        yield from ("", f"Keys of `{path}`:", "", *table(below, {}))
        yield from nested(below, shown, prefix=f"{path}.")


def render(role: Path) -> str:
    """Return the README of a role as Markdown, ending in one newline."""
    specs, defaults = read_specs(role), read_defaults(role)
    about = load(role / "meta" / "main.yml").get("galaxy_info", {}).get("description", "")
    lines = [f"# {role.name}", "", MARK]
    shown: dict[str, dict[str, dict[str, Any]]] = {}
    if about:
        lines += ["", text(about)]
    for entry in sorted(specs, key=lambda name: (name != "main", name)):
        spec = specs[entry]
        lines += ["", f"## {entry}", "", text(spec.get("short_description"))]
        description = text(spec.get("description"))
        if description and description != text(spec.get("short_description")):
            lines += ["", description]
        options = spec.get("options") or {}
        if options:
            lines += ["", *table(options, defaults), *nested(options, shown)]
        else:
            lines += ["", "Takes no variables."]
    return "\n".join(lines) + "\n"


def stale(roles: list[Path]) -> list[Path]:
    """Return the README paths whose text is not what the role's specs say now."""
    return [
        role / "README.md"
        for role in roles
        if not (role / "README.md").is_file() or (role / "README.md").read_text() != render(role)
    ]


def main(argv: list[str] | None = None) -> int:
    """Write the stale READMEs, or with `--check` name them and return 1."""
    parser = argparse.ArgumentParser(description="Write each role's README.md from its argument specs.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a README is stale")
    parser.add_argument("--roles", type=Path, default=ROLES)
    args = parser.parse_args(argv)
    found = stale(role_directories(args.roles))
    for path in found:
        if args.check:
            sys.stderr.write(f"{path}: stale; run `python -m pdstack.deploy.roledocs`\n")
        else:
            path.write_text(render(path.parent))
            sys.stdout.write(f"wrote {path}\n")
    return 1 if args.check and found else 0


if __name__ == "__main__":
    raise SystemExit(main())
