"""Whether each Ansible role declares exactly what it takes.

A role's interface is written twice, since Ansible reads it twice: `defaults/main.yml` gives the values and
`meta/argument_specs.yml` the types that are checked before the role runs. This check keeps the two equal and sees to
it that every entry point (a file of `tasks/` that is not private) is declared, so that a typo in a play is refused
and not ignored.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROLES = Path(__file__).resolve().parents[3] / "roles"


def load(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, empty for a missing or empty file; ValueError when it holds anything else."""
    if not path.is_file():
        return {}
    data = yaml.safe_load(path.read_text())
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"{path}: found a {type(data).__name__}, wanted a mapping")
    return data


def read_specs(role: Path) -> dict[str, dict[str, Any]]:
    """Return the entry points of a role: name -> its spec (`short_description`, `options`, ...)."""
    specs = load(role / "meta" / "argument_specs.yml").get("argument_specs", {})
    return {name: spec or {} for name, spec in specs.items()}


def read_defaults(role: Path) -> dict[str, Any]:
    """Return the role's default variables."""
    return load(role / "defaults" / "main.yml")


def entry_points(role: Path) -> list[str]:
    """Return the names under which a play may enter the role: task files, less those that start with `_`."""
    return sorted(path.stem for path in (role / "tasks").glob("*.yml") if not path.name.startswith("_"))


def is_computed(value: object) -> bool:
    """Tell whether a default is derived from other variables, so that a spec cannot state its value."""
    return isinstance(value, str) and "{{" in value


def check_options(options: dict[str, dict[str, Any]], defaults: dict[str, Any], where: str) -> Iterator[str]:
    """Yield a sentence for each option that disagrees with the role's defaults."""
    for name, option in options.items():
        if "description" not in option:
            yield f"{where}: option {name} has no description; add one sentence"
        if option.get("required"):
            if name in defaults:
                yield f"{where}: option {name} is required, yet defaults/main.yml gives it a value; drop one of the two"
            continue
        if name not in defaults:
            yield (
                f"{where}: option {name} is not in defaults/main.yml; give it a default there or mark it required: true"
            )
            continue
        found, wanted = option.get("default"), defaults[name]
        if is_computed(wanted) and "default" not in option:
            continue
        if wanted is None and "default" not in option:
            continue
        if found != wanted or type(found) is not type(wanted):
            yield f"{where}: option {name} has default {found!r} in the spec, {wanted!r} in defaults/main.yml"


def check_role(role: Path) -> list[str]:
    """Return what is wrong with the interface of one role, as sentences; empty when it is right."""
    specs, defaults, name = read_specs(role), read_defaults(role), role.name
    problems: list[str] = []
    if not specs:
        return [f"{name}: meta/argument_specs.yml declares nothing; declare each of {entry_points(role)}"]
    for entry in entry_points(role):
        if entry not in specs:
            problems.append(f"{name}: tasks/{entry}.yml can be entered but argument_specs.yml does not declare it")
    declared: set[str] = set()
    for entry, spec in specs.items():
        where = f"{name}/{entry}"
        if not (role / "tasks" / f"{entry}.yml").is_file():
            problems.append(f"{where}: declared, but there is no tasks/{entry}.yml")
        if not spec.get("short_description"):
            problems.append(f"{where}: has no short_description")
        options = spec.get("options") or {}
        declared |= options.keys()
        problems += check_options(options, defaults, where)
    problems += [
        f"{name}: {key} is in defaults/main.yml but no entry point declares it"
        for key in defaults
        if key not in declared and not key.startswith("__")
    ]
    return problems


def role_directories(roles: Path) -> list[Path]:
    """Return the roles below `roles`, sorted by name."""
    return sorted(path for path in roles.iterdir() if (path / "tasks").is_dir())


def main(argv: list[str] | None = None) -> int:
    """Check every role and return the exit status: 0 when all agree, 1 with a line for each problem."""
    parser = argparse.ArgumentParser(description="Compare each role's argument_specs with its defaults.")
    parser.add_argument("--check", action="store_true", help="accepted for symmetry: checking is all this does")
    parser.add_argument("--roles", type=Path, default=ROLES)
    args = parser.parse_args(argv)
    roles = role_directories(args.roles)
    problems = [problem for role in roles for problem in check_role(role)]
    for problem in problems:
        sys.stderr.write(problem + "\n")
    sys.stdout.write(f"argument specs: {len(roles)} roles, {len(problems)} problems\n")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
