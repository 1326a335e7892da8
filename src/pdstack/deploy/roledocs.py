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


def meaning_of(option: dict[str, Any]) -> str:
    """Return the description of an option, with its choices."""
    choices = ", ".join(code(choice) for choice in option.get("choices", ()))
    return text(option.get("description")) + (f" One of {choices}." if choices else "")


def merged(specs: dict[str, dict[str, Any]]) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Return each option once, as its first entry point declares it, with the entry points that take it."""
    options: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for entry, spec in specs.items():
        for name, option in (spec.get("options") or {}).items():
            options.setdefault(name, (option, []))[1].append(entry)
    return options


def variables(specs: dict[str, dict[str, Any]], defaults: dict[str, Any]) -> Iterator[str]:
    """Yield a Markdown table of all variables and, below it, one for each dict with declared keys."""
    options = merged(specs)
    yield "| variable | type | default | entry points | meaning |"
    yield "|---|---|---|---|---|"
    for name, (option, entries) in options.items():
        where = "all" if len(entries) == len(specs) else ", ".join(entries)
        default = default_of(name, option, defaults)
        yield f"| `{name}` | {type_of(option)} | {default} | {where} | {meaning_of(option)} |"
    for name, (option, _) in options.items():
        yield from keys(name, option)


def keys(path: str, option: dict[str, Any]) -> Iterator[str]:
    """Yield a table of the keys that an option's dict may have, and of those of the dicts in it."""
    below = option.get("options") or {}
    if not below:
        return
    yield from ("", f"Keys of `{path}`:", "", "| key | type | default | meaning |", "|---|---|---|---|")
    for name, key in below.items():
        yield f"| `{name}` | {type_of(key)} | {default_of(name, key, {})} | {meaning_of(key)} |"
    for name, key in below.items():
        yield from keys(f"{path}.{name}", key)


def render(role: Path) -> str:
    """Return the README of a role as Markdown, ending in one newline."""
    found = read_specs(role)
    specs = {entry: found[entry] for entry in sorted(found, key=lambda name: (name != "main", name))}
    about = load(role / "meta" / "main.yml").get("galaxy_info", {}).get("description", "")
    lines = [f"# {role.name}", "", MARK]
    if about:
        lines += ["", text(about)]
    lines += ["", "## Entry points", "", "| entry point | what it does |", "|---|---|"]
    for entry, spec in specs.items():
        lines.append(f"| `{entry}` | {text(spec.get('short_description'))} |")
    for entry, spec in specs.items():
        if spec.get("description"):
            lines += ["", f"`{entry}`: {text(spec['description'])}"]
    if merged(specs):
        lines += ["", "## Variables", "", *variables(specs, read_defaults(role))]
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
