"""Filters of the role `service`. A shim: the logic and its tests are in src/pdstack/deploy/service.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from pdstack.deploy import service  # needs the path above


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"pdstack_service_errors": service.errors, "pdstack_service_plan": service.plan}
