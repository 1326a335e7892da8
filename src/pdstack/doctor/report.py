"""What the checks found out, as text to read and as the JSON file that the doctor leaves.

    python -m pdstack.doctor.report --json FILE [--all] [--print-json]      prints FILE; status 0 all right, 1 warnings,
                                                                            2 failures

Standard library only, for Python >= 3.9: it also runs on a host without Ansible.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
VERDICTS = ("fail", "warn", "skip", "ok")
INDENT = " " * 9


def counts(rows: Iterable[Row]) -> dict[str, int]:
    """Return how many rows have each verdict."""
    found = dict.fromkeys(VERDICTS, 0)
    for row in rows:
        found[row["verdict"]] += 1
    return found


def status(rows: Iterable[Row]) -> int:
    """Return the exit status: 0 all right, 1 warnings, 2 failures."""
    found = counts(rows)
    return 2 if found["fail"] else 1 if found["warn"] else 0


def report(hosts: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Return what the JSON file holds: the rows of each host, how many there are of each verdict, the exit status."""
    rows = [row for host in hosts.values() for row in host]
    return {"status": status(rows), "counts": counts(rows), "hosts": {host: list(rows) for host, rows in hosts.items()}}


def render(hosts: Mapping[str, Sequence[Row]], *, everything: bool = False) -> list[str]:
    """Return the table: a line a check that is not right, with what to do; the others in one line a host, or all."""
    lines = []
    width = max((len(host) for host in hosts), default=0)
    for host, rows in hosts.items():
        for row in rows:
            if everything or row["verdict"] in ("fail", "warn"):
                lines += _row(host.ljust(width), row)
        lines.append(f"{'':4}  {host.ljust(width)}  {_counted(counts(rows))}")
    return [*lines, "", _last(hosts)]


def _row(host: str, row: Row) -> list[str]:
    head = f"{row['verdict'].upper():4}  {host}  {row['number']:2d}  {row['title']}"
    if row["verdict"] in ("ok", "skip"):
        return [f"{head}: {row['found']}"]
    role = row["mended_by"]
    mended = "" if not role or role in row["fix"] else f" (Ansible role {role}; nox -s deploy)"
    return [
        head,
        f"{INDENT}found:  {row['found']}",
        f"{INDENT}wanted: {row['wanted']}",
        f"{INDENT}fix:    {row['fix']}{mended}",
    ]


def _counted(found: Mapping[str, int]) -> str:
    warnings = "warning" if found["warn"] == 1 else "warnings"
    words = (("fail", "failed"), ("warn", warnings), ("ok", "ok"), ("skip", "skipped"))
    return ", ".join(f"{found[verdict]} {word}" for verdict, word in words if found[verdict])


def _last(hosts: Mapping[str, Sequence[Row]]) -> str:
    rows = [row for host in hosts.values() for row in host]
    failed = [row for row in rows if row["verdict"] == "fail"]
    count = f"{len(hosts)} host{'s' if len(hosts) != 1 else ''}"
    if not failed:
        return f"{count}: {_counted(counts(rows))}. Nothing was changed."
    byrole = sum(bool(row["mended_by"]) for row in failed)
    mended = ""
    if byrole:
        mended = f" (`nox -s deploy` mends {byrole} of the failures" + (
            ")" if byrole == len(failed) else ", not the others)"
        )
    return f"{count}: {_counted(counts(rows))}{mended}. Nothing was changed."


def text(rows: Sequence[Row], host: str, verdicts: Sequence[str] = ("fail",)) -> str:
    """Return what is wrong with a host as the message of a preflight; empty if nothing is."""
    wrong = [row for row in rows if row["verdict"] in verdicts]
    if not wrong:
        return ""
    lines = [f"host {host} is not ready. Nothing was changed."]
    for row in wrong:
        lines += [
            f"- {row['title']} (check {row['number']})",
            f"     found:  {row['found']}",
            f"     wanted: {row['wanted']}",
            f"     fix:    {row['fix']}",
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a report that was written, and return its status."""
    parser = argparse.ArgumentParser(prog="pdstack.doctor.report", description="Print what the doctor found out.")
    parser.add_argument("--json", required=True, type=Path, metavar="FILE", help="what playbooks/doctor.yml wrote")
    parser.add_argument("--all", action="store_true", help="a line for checks that are right or skipped, too")
    parser.add_argument("--print-json", action="store_true", help="print the file itself instead of the table")
    options = parser.parse_args(arguments)
    try:
        content = json.loads(options.json.read_text())
    except (OSError, ValueError) as error:
        sys.stderr.write(f"no report: {error}\n")
        return 2
    if options.print_json:
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(render(content["hosts"], everything=options.all)) + "\n")
    return int(content["status"])


if __name__ == "__main__":
    sys.exit(main())
