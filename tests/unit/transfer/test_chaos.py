"""A short run of the faults at random points; `nox -s chaos` does a thousand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_faults_at_random_points_leave_nothing_wrong() -> None:
    command = [sys.executable, "-m", "tests.chaos", "--points", "30", "--path", "auto", "stream"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "30 points: 0 violations" in done.stdout
