from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from tests.standins import fakehost  # noqa: E402 - needs the path above

from pdstack.doctor import probe  # noqa: E402 - beside the stand-ins

Facts = dict[str, Any]


def read(root: Path, *options: str) -> Facts:
    """Return what the probe, run as a program, says of the host below `root`."""
    done = subprocess.run(
        [sys.executable, "-I", probe.__file__, "--root", str(root), *options],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    found: Facts = json.loads(done.stdout)
    assert found["errors"] == []
    return found


@pytest.fixture
def host(tmp_path: Path) -> Callable[..., Facts]:
    """Make a fake host and probe it; `options` are the probe's."""

    def make(*options: str, **what: Any) -> Facts:
        return read(fakehost.make(tmp_path / "host", **what), *options)

    return make
