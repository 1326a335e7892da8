"""Filters of fabrics. A shim: the logic and its tests are in src/pdstack/deploy/fabrics.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from pdstack.deploy import fabrics, validate  # needs the path above


def _environment(profile: dict[str, Any], variables: Any, engine: str, backend: str, port: int | None = None) -> Any:
    return fabrics.environment(profile, variables, engine=engine, backend=backend, port=port)


def _problems(profile: dict[str, Any], name: str, variables: Any, engine: str, host: str) -> str:
    found = fabrics.problems(name, profile, variables, engine=engine, host=host)
    return validate.render(found) if found else ""


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "pdstack_fabric_environment": _environment,
            "pdstack_fabric_container": fabrics.container,
            "pdstack_fabric_promised": fabrics.promised,
            "pdstack_fabric_problems": _problems,
        }
