"""Writes the doctor as one file to carry to a host: `python3 -m pdstack.doctor.bundle OUT`, there `python3 OUT`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipapp
from collections.abc import Sequence
from pathlib import Path

MODULES = ("__init__", "__main__", "checks", "plan", "probe", "report")


def write(out: Path) -> None:
    """Write the archive; it runs with any Python >= 3.9 and nothing else."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        package = root / "pdstack" / "doctor"
        package.mkdir(parents=True)
        (root / "pdstack" / "__init__.py").touch()
        for name in MODULES:
            (package / f"{name}.py").write_text((here / f"{name}.py").read_text())
        (root / "__main__.py").write_text(
            "import sys\n\nfrom pdstack.doctor.__main__ import main\n\nsys.exit(main())\n"
        )
        zipapp.create_archive(root, out, interpreter="/usr/bin/env python3", compressed=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the archive where the command line says."""
    parser = argparse.ArgumentParser(prog="pdstack.doctor.bundle", description="Write the doctor as one file.")
    parser.add_argument("out", type=Path, help="the file to write, such as doctor.pyz")
    options = parser.parse_args(arguments)
    write(options.out)
    sys.stdout.write(f"{options.out}: run it with python3 on the host\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
