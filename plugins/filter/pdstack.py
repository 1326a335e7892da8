"""Filters over the inventory. A shim: the logic and its tests are in src/pdstack/deploy."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))

from pdstack.deploy import topology, validate  # noqa: E402  # needs the path above


def _members(groups: Mapping[str, Sequence[str]], hostvars: Any) -> dict[str, Any]:
    wanted = dict.fromkeys(host for group in validate.GROUPS for host in groups.get(group, ()))
    return {host: hostvars[host] for host in wanted}


def project_path(relative: str) -> str:
    return str((ROOT / relative).resolve())


def build(groups: Mapping[str, Sequence[str]], hostvars: Any, settings: Mapping[str, Any]) -> Any:
    return topology.build(groups, _members(groups, hostvars), settings)


def problems(groups: Mapping[str, Sequence[str]], hostvars: Any, settings: Mapping[str, Any]) -> str:
    found = validate.problems(groups, _members(groups, hostvars), settings)
    return validate.render(found) if found else ""


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"pdstack_project_path": project_path, "pdstack_topology": build, "pdstack_problems": problems}
