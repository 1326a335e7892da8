"""Writes docs/checks.md, the table of the checks: `python -m pdstack.doctor.checkdocs [--check]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pdstack.doctor.checks import CHECKS

PAGE = Path(__file__).resolve().parents[3] / "docs/checks.md"
HEAD = """# The checks of a host

`nox -s doctor` asks them of every host of the inventory ([runbook](runbooks/doctor.md)); the preflights of the Ansible
roles are the same ones. `python -m pdstack.doctor.checkdocs` writes this table, out of src/pdstack/doctor/checks.py.

*severity*: the verdict when it does not hold; some are judged harder where the fabric depends on it. *stage*: from when
on it can be right: `bare` before anything is installed (a failure stops a deployment before it changes anything),
`provisioned` when the Ansible role in the next column has run, `image` with the runtime image on the host
(`-e doctor_image=REF`), `serving` when the deployment runs.

| # | id | holds when | severity | stage | mended by |
|---|---|---|---|---|---|
"""


def page() -> str:
    """Return the page."""
    rows = []
    for entry in CHECKS:
        holds = " ".join((entry.function.__doc__ or "").split())
        role = f"`{entry.mended_by}`" if entry.mended_by else ""
        rows.append(f"| {entry.number} | {entry.id} | {holds} | {entry.severity} | {entry.stage} | {role} |")
    return HEAD + "\n".join(rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or with --check say whether it is fresh."""
    parser = argparse.ArgumentParser(prog="pdstack.doctor.checkdocs")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the page is not fresh")
    options = parser.parse_args(arguments)
    if options.check:
        fresh = PAGE.is_file() and PAGE.read_text() == page()
        if not fresh:
            sys.stderr.write(f"{PAGE.name} is not fresh: python -m pdstack.doctor.checkdocs\n")
        return 0 if fresh else 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
