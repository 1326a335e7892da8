"""Say once more, at the end of a long run, which tests failed and why: `python -m tests.report JUNIT.xml ...`.

A session's own report is far up by then, and what keeps only the end of a log would not have it at all.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

LINES = 12


def failures(junit: Path) -> list[str]:
    """The tests that failed in one of pytest's junit files, each with the last lines of its report."""
    found = []
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        for kind in ("failure", "error"):
            for problem in case.iter(kind):
                said = (problem.text or problem.get("message") or "").strip().splitlines()
                # What was found and wanted is on the lines that pytest marks; where it is stands at the end.
                why = [line for line in said if line.startswith("E ")][:LINES] + said[-1:]
                found.append("\n".join([f"{case.get('classname')}::{case.get('name')} ({kind})", *why]))
    return found


def main(arguments: list[str]) -> int:
    """Print the failures of all files that exist; nothing if there are none."""
    for junit in map(Path, arguments):
        if junit.is_file():
            found = failures(junit)
            if found:
                print(f"\n{junit.stem}: {len(found)} failed")
            for text in found:
                print(f"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
