"""The failures of a long run are said once more at its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BROKEN = """\
import pytest

@pytest.fixture
def away():
    raise ConnectionError("no server")

def test_well(): pass
def test_sum(): assert 1 + 1 == 3, "arithmetic"
def test_server(away): pass
"""


def test_failures_and_errors_are_said_with_their_reason(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text(BROKEN)
    junit = tmp_path / "unit.xml"
    quiet = {"stdout": subprocess.DEVNULL, "check": False, "cwd": tmp_path}
    subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={junit}"], **quiet)
    absent = tmp_path / "e2e.xml"
    command = [sys.executable, "-m", "tests.report", str(junit), str(absent)]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "unit: 2 failed" in said
    assert "test_broken::test_sum (failure)" in said
    assert "arithmetic" in said
    assert "test_broken::test_server (error)" in said
    assert "no server" in said
    assert "test_well" not in said
